# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "CleanRL 20.3, Zoo 20.6 (10M)",
    "ALE-Breakout-v5": "Dopamine 18.9 with Adam, 6.7 with RMSProp (1M, sticky actions)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 5_000,
    "first": 1_500,  # all programs learn from step 1,000 on, and rarely act at random
    "peers": {
        "CleanRL's dqn_atari.py": {
            "flags": "--learning-starts 1000 --buffer-size 20000 --start-e 0.01",
            "equal": "one game, float32",
        },
        "Stable-Baselines3's DQN": {
            "env_id": "BreakoutNoFrameskip-v4",
            "num_envs": 1,
            "settings": {
                "buffer_size": 20_000,
                "learning_starts": 1_000,
                "batch_size": 32,
                "train_freq": 4,
                "gradient_steps": 1,
                "target_update_interval": 1_000,
                "learning_rate": 1e-4,
                "exploration_initial_eps": 0.01,
                "exploration_final_eps": 0.01,
            },
            "equal": "one game, float32",
        },
    },
    "flags": "--learning-starts 1000 --buffer-size 20000 --start-e 0.01 --adam-epsilon 1e-8 "
    "--loss squared",
    "variants": {
        "eight games, bfloat16": "--precision bfloat16",
        "eight games, float32": "--precision float32",
        "one game, bfloat16": "--precision bfloat16 --num-envs 1",
        "one game, float32": "--precision float32 --num-envs 1",
    },
    "floors": {
        "floor, bfloat16": "1200 1600 --precision bfloat16",
        "floor, float32": "1200 1600 --precision float32",
    },
}
