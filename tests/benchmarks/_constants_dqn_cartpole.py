# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 488.7 (500k), Zoo 500 (50k)",
    "Acrobot-v1": "CleanRL -91.5 (500k), Zoo -76.6 (100k)",
    "MountainCar-v0": "CleanRL -195.0 (500k), Zoo -100.8 (120k)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 40_000,
    "first": 11_000,  # all programs learn from step 10,000 on, and rarely act at random
    "peers": {
        "CleanRL's dqn.py": {
            "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05",
            # Its layers have 120 and 84 units: they get the 128 of the others.
            "replace": {
                "prod(), 120": "prod(), 128",
                "Linear(120, 84": "Linear(128, 128",
                "Linear(84": "Linear(128",
            },
            "equal": "one environment",
        },
        "Stable-Baselines3's DQN": {
            "env_id": "CartPole-v1",
            "num_envs": 10,
            "settings": {
                "buffer_size": 10_000,
                "learning_starts": 10_000,
                "batch_size": 128,
                "train_freq": 1,
                "gradient_steps": 1,
                "target_update_interval": 500,
                "exploration_initial_eps": 0.05,
                "exploration_final_eps": 0.05,
                "learning_rate": 2.5e-4,
                "policy_kwargs": {"net_arch": [128, 128]},
                "device": "cpu",
            },
            "equal": "ten environments",
        },
    },
    "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05 --buffer-size 10000 "
    "--train-frequency 10 --target-network-frequency 500 --batch-size 128 --hidden-size 128 "
    "--learning-rate 2.5e-4 --no-anneal-lr",
    "variants": {"ten environments": "--num-envs 10", "one environment": "--num-envs 1"},
    "floors": {"floor": "12000 16000 --num-envs 10"},
}
