# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 490.0 (500k), Zoo 500 (100k)",
    "Acrobot-v1": "CleanRL -86.4 (500k), Zoo -73.5 (1M)",
    "MountainCar-v0": "CleanRL -200.0 (500k), Zoo -110.4 (1M)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 60_000,
    "first": 5_000,
    "peers": {
        "CleanRL's ppo.py": {"flags": "", "equal": "four environments"},
        "Stable-Baselines3's PPO": {
            "env_id": "CartPole-v1",
            "num_envs": 4,
            "settings": {
                "n_steps": 128,
                "batch_size": 128,
                "n_epochs": 4,
                "learning_rate": 2.5e-4,
                "ent_coef": 0.01,
                "clip_range_vf": 0.2,
                "device": "cpu",
            },
            "equal": "four environments",
        },
    },
    "flags": "--num-steps 128 --num-minibatches 4 --update-epochs 4 --clip-vloss --gamma 0.99 "
    "--gae-lambda 0.95 --ent-coef 0.01 --learning-rate 2.5e-4",
    "variants": {"four environments": "--num-envs 4"},
    "floors": {"floor": "1024 5120 --num-envs 4"},
}
