"""What all scripts have to do alike, in whatever code: asked of each of them in this process."""

import dataclasses
import importlib
import re
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FROM_PIXELS = ["dqn_atari", "ppo_atari"]

# What a run may change when it goes on or is played. Whoever adds to this list must be sure that nobody's weights care.
MAY_CHANGE = {
    "total_timesteps", "device", "resume", "evaluate", "eval_episodes", "eval_epsilon", "capture_video", "compile",
    "num_threads",
}  # fmt: skip
MAY_CHANGE_IN_REINFORCE = {"checkpoint_frequency"}  # an update ends with whole episodes, which a checkpoint cannot cut


@pytest.fixture(params=[path.stem for path in SCRIPTS])
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=FROM_PIXELS)
def from_pixels(request):
    return importlib.import_module(request.param)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def another(name, value, annotation):
    """A value that the argument could have, too."""
    if typing.get_origin(annotation) is typing.Literal:
        return next(choice for choice in typing.get_args(annotation) if choice != value)
    if name in ("target_kl", "max_grad_norm"):
        return 0.25
    return {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 2 or 0.5}.get(
        type(value), lambda: f"{value}_"
    )()


def test_a_run_that_goes_on_is_the_run_that_was_started(script, capsys):
    """Every argument in turn: refused a change by its name, unless it has no part in what is learned."""
    may_change = MAY_CHANGE | (MAY_CHANGE_IN_REINFORCE if script.SCRIPT == "reinforce_cartpole" else set())
    saved, types = script.Args(), typing.get_type_hints(script.Args)
    for name, value in dataclasses.asdict(saved).items():
        args = dataclasses.replace(saved, **{name: another(name, value, types[name])})
        assert getattr(args, name) != value
        try:
            script.refuse_changes(args, saved)
            assert name in may_change, name
        except SystemExit:
            assert name not in may_change, name
            assert f"--{name.replace('_', '-')} cannot be changed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.refuse_changes(dataclasses.replace(saved, total_timesteps=saved.total_timesteps - 1), saved)


def test_a_run_folder_is_named_after_what_is_run(script, tmp_path):
    args = script.Args(exp_name="mine", seed=7, env_id="my_module:Mine-v3", runs_dir=str(tmp_path / "all"))
    path = script.make_run_dir(args)
    assert path.is_dir() and path.parent == tmp_path / "all"
    assert re.fullmatch(r"my_module-Mine-v3__mine__7__\d{8}-\d{6}", path.name)


@pytest.mark.parametrize("name, most", [("ppo_cartpole", 2), ("ppo_continuous", 2), ("ppo_atari", 1)])
def test_no_minibatch_has_a_single_step(name, most):
    """Its deviation would be NaN. Of 5 steps, two minibatches have 2 and 3; on Atari, up to half of them are resets."""
    Args = importlib.import_module(name).Args
    Args(num_envs=1, num_steps=5, num_minibatches=most)
    with pytest.raises(ValueError, match="--num-minibatches"):
        Args(num_envs=1, num_steps=5, num_minibatches=most + 1)
    if name == "ppo_atari":  # of 5 steps in each of 4 environments, 3 may be resets: 8 are left
        Args(num_envs=4, num_steps=5, num_minibatches=4)
        with pytest.raises(ValueError, match="--num-minibatches"):
            Args(num_envs=4, num_steps=5, num_minibatches=5)


class FirstCheckpoint(Exception):
    pass


def first_weights(script, monkeypatch, tmp_path, **settings):
    """All parts of the checkpoint at step 0 that are networks."""

    def save_checkpoint(run_dir, args, parts, **counters):
        raise FirstCheckpoint({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})

    few = {"buffer_size": 200, "learning_starts": 64} if script.SCRIPT == "dqn_atari" else {}
    monkeypatch.setattr(script, "save_checkpoint", save_checkpoint)
    with pytest.raises(FirstCheckpoint) as stopped:
        script.train(script.Args(**few | settings, runs_dir=str(tmp_path)))
    return {
        f"{part}.{name}": weights.clone()
        for part, network in stopped.value.args[0].items() for name, weights in network.named_parameters()
    }  # fmt: skip


@pytest.mark.slow
def test_the_seed_makes_the_first_network(script, monkeypatch, tmp_path):
    torch.manual_seed(99)  # whatever was drawn before
    first, again, other = (first_weights(script, monkeypatch, tmp_path / str(k), seed=k // 2) for k in (2, 3, 4))
    assert all(torch.equal(weights, again[name]) for name, weights in first.items())
    assert any(not torch.equal(weights, other[name]) for name, weights in first.items())


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_atari"])
def test_the_target_network_starts_as_a_copy(monkeypatch, tmp_path, name):
    weights = first_weights(importlib.import_module(name), monkeypatch, tmp_path)
    ours = [name for name in weights if name.startswith("q_network.")]
    assert len(ours) >= 6
    assert all(torch.equal(weights[name], weights[name.replace("q_network", "target_network")]) for name in ours)


# ---- What a user sees of the training -------------------------------------------------------------------------------

# A training that logs several times, and as many again when it is resumed.
SMALL = {
    "reinforce_cartpole": {"total_timesteps": 600},
    "dqn_cartpole": {"total_timesteps": 300, "learning_starts": 64},
    "dqn_atari": {
        "total_timesteps": 300, "learning_starts": 64, "buffer_size": 200, "batch_size": 4, "train_frequency": 20,
        "eval_episodes": 1,
    },
    "ppo_cartpole": {"total_timesteps": 256, "num_steps": 16, "num_envs": 2, "num_minibatches": 2},
    "ppo_continuous": {"total_timesteps": 800, "num_steps": 50, "num_envs": 4, "num_minibatches": 2},
    "ppo_atari": {"total_timesteps": 240, "num_steps": 8, "num_envs": 5, "num_minibatches": 2, "eval_episodes": 1},
}  # fmt: skip


class Pays(gym.Env):
    """Episodes of 10 steps, each of which pays 3."""

    observation_space, action_space = gym.spaces.Box(0, 1, (2,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(2, np.float32), 3.0, self.t == 10, False, {}


gym.register("PaysThree-v0", entry_point=Pays)


class Bar:
    """Notes what tqdm is told."""

    def __init__(self, step, total):
        self.n, self.told = step, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, steps):
        self.n += steps

    def set_postfix_str(self, text, refresh):
        self.told.append(text)


@pytest.mark.slow
def test_speed_is_of_this_process_and_the_bar_has_the_last_returns(script, monkeypatch, tmp_path):
    """The clock goes on by a second with each look at it: one at the start, one at each point of the log."""
    env_id = "Film-v0" if script.SCRIPT in FROM_PIXELS else "PaysThree-v0"
    env_id = "Pendulum-v1" if script.SCRIPT == "ppo_continuous" else env_id
    settings = SMALL[script.SCRIPT] | {"env_id": env_id, "runs_dir": str(tmp_path), "checkpoint_frequency": 0}
    if hasattr(script, "LOG_FREQUENCY"):
        monkeypatch.setattr(script, "LOG_FREQUENCY", 50)
    run_dir = script.train(script.Args(**settings | ({"num_threads": 1} if script.SCRIPT in FROM_PIXELS else {})))
    saved = script.load_checkpoint(run_dir)
    total, clock = 2 * saved["global_step"], iter(range(1000))
    bar = Bar(saved["global_step"], total)
    monkeypatch.setattr(script, "progress_bar", lambda *_: bar)
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    script.train(dataclasses.replace(saved["args"], total_timesteps=total, resume=str(run_dir)))
    monkeypatch.undo()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    speeds = [event for event in events.Scalars("charts/SPS") if event.step > saved["global_step"]]
    assert len(speeds) >= 3
    expected = [(event.step - saved["global_step"]) / looks for looks, event in enumerate(speeds, 1)]
    assert [event.value for event in speeds] == pytest.approx(expected)
    returns = [event for event in events.Scalars("charts/episodic_return") if event.step > saved["global_step"]]
    last = [event.value for event in returns if event.step <= speeds[-1].step]
    last = last[-1:] if script.SCRIPT == "reinforce_cartpole" else last[-20:]
    assert bar.told[-1] == f"return {np.mean(last):.1f}" and bar.n == total


# ---- Networks, against their layers written out ---------------------------------------------------------------------


def linear(layers, k, x):
    return x @ layers[k].weight.T + layers[k].bias


def dense(layers, x, activation):
    """Linear layers with an activation between."""
    for k in range(0, len(layers), 2):
        x = linear(layers, k, x if k == 0 else activation(x))
    return x


def test_networks_for_flat_observations():
    import dqn_cartpole
    import ppo_cartpole
    import ppo_continuous
    import reinforce_cartpole

    torch.manual_seed(0)
    obs = 3 * torch.randn(50, 4)  # far enough from 0 for every unit to be bent
    widths = {
        reinforce_cartpole.Policy(4, 3).layers: [(128, 4), (3, 128)],
        **{script.Agent(4, 3, False).actor: [(64, 4), (64, 64), (3, 64)] for script in (ppo_cartpole, ppo_continuous)},
        **{script.Agent(4, 3, False).critic: [(64, 4), (64, 64), (1, 64)] for script in (ppo_cartpole, ppo_continuous)},
    }
    for layers, expected in widths.items():
        assert [tuple(layer.weight.shape) for layer in layers[::2]] == expected
    policy = reinforce_cartpole.Policy(4, 3)
    torch.nn.init.normal_(policy.layers[-1].weight)  # it starts at 0
    torch.testing.assert_close(policy(obs), dense(policy.layers, obs, lambda x: x.clamp(min=0)))
    q_network = dqn_cartpole.QNetwork(4, 3, 16, norm_obs=False)
    torch.testing.assert_close(q_network(obs), dense(q_network.layers, obs, lambda x: x.clamp(min=0)))
    for script in (ppo_cartpole, ppo_continuous):
        agent = script.Agent(4, 3, norm_obs=False)
        policy, values = agent(obs)
        torch.testing.assert_close(policy, dense(agent.actor, obs, torch.tanh))
        torch.testing.assert_close(values, dense(agent.critic, obs, torch.tanh)[:, 0])


def test_networks_for_pixels(from_pixels):
    """Pixels from 0 to 1, a ReLU after every layer but the last; the order in memory changes nothing."""
    torch.manual_seed(0)
    name = "QNetwork" if from_pixels.SCRIPT == "dqn_atari" else "Agent"
    network = getattr(from_pixels, name)(4, bfloat16=False, norm_obs=False)
    for layer in network.features:
        if hasattr(layer, "bias"):
            torch.nn.init.normal_(layer.bias, std=0.3)  # they start at 0
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    found = network(obs)
    x, layers = obs.double() / 255, network.double().features
    for k, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, layers[k].weight, layers[k].bias, stride).clamp(min=0)
    x = linear(layers, 7, x.flatten(1)).clamp(min=0)
    heads = [network.head] if name == "QNetwork" else [network.actor, network.critic]
    for output, head in zip([found] if name == "QNetwork" else found, heads):
        expected = x @ head.weight.T + head.bias
        torch.testing.assert_close(output.double().view(expected.shape), expected, rtol=1e-4, atol=1e-4)


# ---- Environments, device -------------------------------------------------------------------------------------------


class Spaces(gym.Env):
    def __init__(self, obs, actions):
        self.observation_space, self.action_space = obs, actions


FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
SPACES = {
    "float frames": (gym.spaces.Box(0, 1, (4, 84, 84), np.float32), gym.spaces.Discrete(4)),
    "frames last": (gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), gym.spaces.Discrete(4)),
    "one frame": (gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)),
    "no box": (gym.spaces.Dict({"frames": FRAMES}), gym.spaces.Discrete(4)),
    "actions from 1": (FRAMES, gym.spaces.Discrete(4, start=1)),
    "a vector of actions": (FRAMES, gym.spaces.MultiDiscrete([2, 2])),
    "257 actions": (FRAMES, gym.spaces.Discrete(257)),
    "256 actions": (FRAMES, gym.spaces.Discrete(256)),
}
for number, spaces in enumerate(SPACES.values()):
    gym.register(f"Spaces{number}-v0", entry_point=Spaces, kwargs=dict(zip(("obs", "actions"), spaces)))


@pytest.mark.parametrize("which", SPACES)
def test_spaces_that_do_not_fit_are_refused(from_pixels, capsys, which):
    args = from_pixels.Args(env_id=f"Spaces{list(SPACES).index(which)}-v0")
    fits = which == "256 actions" or (which == "257 actions" and from_pixels.SCRIPT == "ppo_atari")
    if fits:
        assert from_pixels.make_envs(args, 2).num_envs == 2
        return
    with pytest.raises(SystemExit) as refused:
        from_pixels.make_envs(args, 2)
    assert refused.value.code == 2 and "needs a game such as ALE/Breakout-v5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reinforce_cartpole", "dqn_cartpole", "ppo_cartpole", "ppo_continuous"])
def test_spaces_that_are_not_flat_are_refused(capsys, name):
    script = importlib.import_module(name)
    line, square = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2, 2))
    actions = line if name == "ppo_continuous" else gym.spaces.Discrete(2)
    cases = [(line, actions, True), (square, actions, False), (gym.spaces.Dict({"x": line}), actions, False)]
    cases += [(line, square, False)]
    for obs, actions, fits in cases:
        gym.registry.pop("NotFlat-v0", None)
        gym.register("NotFlat-v0", entry_point=Spaces, kwargs={"obs": obs, "actions": actions})
        if fits:
            assert script.make_envs(script.Args(env_id="NotFlat-v0"))
            continue
        with pytest.raises(SystemExit) as refused:
            script.make_envs(script.Args(env_id="NotFlat-v0"))
        assert refused.value.code == 2 and "needs a flat Box" in capsys.readouterr().err


def test_what_only_the_emulator_can_do_is_refused_elsewhere(from_pixels, capsys):
    with pytest.raises(SystemExit) as refused:
        from_pixels.make_envs(from_pixels.Args(env_id="Spaces7-v0", sticky_actions=0.25), 1)
    assert refused.value.code == 2 and "--sticky-actions" in capsys.readouterr().err


def test_a_game_without_its_namespace_is_told_its_name(from_pixels, capsys):
    for env_id, hint in (("Pong-v5", "the game is ALE/Pong-v5"), ("Pang-v5", "")):
        with pytest.raises(SystemExit):
            from_pixels.make_envs(from_pixels.Args(env_id=env_id), 1)
        line = capsys.readouterr().err
        assert hint in line and ("the game is" in line) == bool(hint)


def make(script, device="cpu", **settings):
    make_network = script.make_network if script.SCRIPT == "dqn_atari" else script.make_agent
    return make_network(script.Args(**settings), gym.make_vec("Spaces7-v0", 1), torch.device(device))


@pytest.mark.parametrize("supported", [True, False])
def test_auto_precision_is_what_the_processor_has(from_pixels, monkeypatch, supported):
    """On another device, where autocast differs, it is float32 whatever the processor has."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert make(from_pixels).bfloat16 == supported
    assert make(from_pixels, precision="bfloat16").bfloat16 and not make(from_pixels, precision="float32").bfloat16
    assert not make(from_pixels, "meta").bfloat16 and make(from_pixels, "meta", precision="bfloat16").bfloat16


@pytest.mark.parametrize("compile", [True, False])
def test_networks_are_compiled_if_asked(from_pixels, monkeypatch, compile):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    network = make(from_pixels, compile=compile)
    assert compiled == [network] * compile


@pytest.mark.parametrize("available", [(), ("cuda",), ("cuda", "mps"), ("mps",)])
def test_the_device_is_the_one_asked_for(script, monkeypatch, capsys, available):
    """auto: for networks as large as those for pixels, cuda if there is one; else the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    large = script.SCRIPT in FROM_PIXELS
    for device in ("auto", "cpu", "cuda", "mps"):
        argument = script.Args(device=device) if large else device
        if device not in ("auto", "cpu", *available):
            with pytest.raises(SystemExit):
                script.pick_device(argument)
            assert f"--device {device}" in capsys.readouterr().err
            continue
        expected = device if device != "auto" else "cuda" if large and "cuda" in available else "cpu"
        assert script.pick_device(argument) == torch.device(expected)


def test_the_device_comes_with_its_threads(from_pixels, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    from_pixels.pick_device(from_pixels.Args(device="cpu"))
    assert threads == [] and torch.backends.cudnn.deterministic
    from_pixels.pick_device(from_pixels.Args(device="cpu", num_threads=3))
    assert threads == [3]


class Film(gym.Env):
    """Games of 20 steps, each of which shows frames of its own and pays 3."""

    observation_space, action_space = FRAMES, gym.spaces.Discrete(200)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.integers(0, 256, (4, 84, 84), dtype=np.uint8), {}

    def step(self, action):
        self.t += 1
        return self.np_random.integers(0, 256, (4, 84, 84), dtype=np.uint8), 3.0, self.t == 20, False, {}


gym.register("Film-v0", entry_point=Film)


def uniform(script, env_id):
    """A network that values all actions alike."""
    network = make(script, env_id=env_id, precision="float32")
    for head in [network.head] if script.SCRIPT == "dqn_atari" else [network.actor, network.critic]:
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    return network


def test_ppo_samples_in_evaluation_and_dqn_plays_the_best_action(from_pixels, monkeypatch, tmp_path):
    sent, send = [], from_pixels.OwnEnvs.send
    monkeypatch.setattr(
        from_pixels.OwnEnvs, "send", lambda envs, actions: sent.extend(actions.tolist()) or send(envs, actions)
    )
    settings = {"eval_epsilon": 0.0} if from_pixels.SCRIPT == "dqn_atari" else {}
    args = from_pixels.Args(env_id="Film-v0", eval_episodes=5, num_threads=1, **settings)
    from_pixels.evaluate(args, uniform(from_pixels, "Film-v0"), tmp_path)
    assert len(set(sent)) == 1 if from_pixels.SCRIPT == "dqn_atari" else len(set(sent)) > 50  # of 100 draws from 256


def test_what_the_network_sees_is_drawn_if_there_is_no_camera(from_pixels, tmp_path):
    args = from_pixels.Args(env_id="Film-v0", eval_episodes=1, capture_video=True, num_threads=1)
    from_pixels.evaluate(args, uniform(from_pixels, "Film-v0"), tmp_path)
    env, shown = Film(), []
    (seed,) = from_pixels.env_seeds(1, (from_pixels.EVALUATION,), 1).tolist()
    for t in range(21):
        obs = env.reset(seed=seed)[0] if t == 0 else env.step(0)[0]
        shown.append(obs[-1])
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.size == (336, 336) and picture.n_frames == 11
        for k in range(11):
            picture.seek(k)
            small = np.asarray(picture.convert("L").resize((84, 84), Image.Resampling.NEAREST))
            assert np.corrcoef(small.ravel(), shown[2 * k].ravel())[0, 1] > 0.9


def test_the_camera_films_the_first_game(from_pixels, monkeypatch, tmp_path):
    """It is another environment: it must get that game's seed and actions, and no step more."""
    sent, seeds, filmed = [], [], []

    class Camera:
        def reset(self, seed):
            seeds.append(seed.tolist())
            return np.zeros((1, 1, 210, 160, 3), np.uint8), {}

        def step(self, actions):
            filmed.append(actions.tolist())
            return np.full((1, 1, 210, 160, 3), len(filmed), np.uint8), 0, False, False, {}

    send = from_pixels.OwnEnvs.send
    monkeypatch.setattr(
        from_pixels.OwnEnvs, "send", lambda envs, actions: sent.append(actions.tolist()) or send(envs, actions)
    )
    monkeypatch.setattr(from_pixels, "make_camera", lambda args: Camera())
    settings = {"eval_epsilon": 0.5} if from_pixels.SCRIPT == "dqn_atari" else {}
    args = from_pixels.Args(env_id="Film-v0", eval_episodes=3, capture_video=True, num_threads=1, **settings)
    network = make(from_pixels, env_id="Film-v0", precision="float32")
    assert from_pixels.evaluate(args, network, tmp_path) == (60.0, 20.0)
    assert seeds == [from_pixels.env_seeds(1, (from_pixels.EVALUATION,), 3)[:1].tolist()]
    assert filmed == [actions[:1] for actions in sent[:20]] and len({tuple(actions) for actions in sent}) > 1
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.size == (320, 420) and picture.n_frames == 11  # of 21, every second one
