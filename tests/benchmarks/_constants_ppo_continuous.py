# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "Pendulum-v1": "Zoo -172 (100k)",
    "HalfCheetah-v5": "CleanRL 1443, Zoo 5819 (1M, older versions)",
    "Hopper-v5": "CleanRL 2383, Zoo 2410 (1M, older versions)",
    "Walker2d-v5": "CleanRL 2288, Zoo 3479 (1M, older versions)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 30_000,
    "first": 2_048,
    "peers": {
        "CleanRL's ppo_continuous_action.py": {
            "flags": "--env-id Pendulum-v1",
            "equal": "one environment",
        },
        "Stable-Baselines3's PPO": {
            "env_id": "Pendulum-v1",
            "num_envs": 1,
            "normalize": True,
            "settings": {
                "n_steps": 2048,
                "batch_size": 64,
                "n_epochs": 10,
                "learning_rate": 3e-4,
                "clip_range_vf": 0.2,
                "device": "cpu",
            },
            "equal": "one environment",
        },
    },
    "flags": "--env-id Pendulum-v1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 "
    "--clip-vloss --gamma 0.99 --gae-lambda 0.95 --learning-rate 3e-4 --ent-coef 0",
    "variants": {"one environment": "--num-envs 1"},
    "floors": {"floor": "2048 6144 --num-envs 1"},
}
