# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "CleanRL 20.4, Zoo 21.0 (10M)",
    "ALE-Breakout-v5": "CleanRL 414.7, Zoo 398 (10M)",
    "ALE-Breakout-v5-10M": "CleanRL 414.7, Zoo 398 (10M)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 12_000,
    "first": 1_024,
    "peers": {
        "CleanRL's ppo_atari.py": {"flags": "", "equal": "eight games, float32"},
        "Stable-Baselines3's PPO": {
            "env_id": "BreakoutNoFrameskip-v4",
            "num_envs": 8,
            "settings": {
                "n_steps": 128,
                "batch_size": 256,
                "n_epochs": 4,
                "learning_rate": 2.5e-4,
                "ent_coef": 0.01,
                "clip_range": 0.1,
                "clip_range_vf": 0.1,
            },
            "equal": "eight games, float32",
        },
    },
    "flags": "",  # by default the settings are those of CleanRL
    "variants": {
        "eight games, bfloat16": "--precision bfloat16",
        "eight games, float32": "--precision float32",
    },
    "floors": {
        "floor, bfloat16": "1024 2048 --precision bfloat16",
        "floor, float32": "1024 2048 --precision float32",
    },
}
