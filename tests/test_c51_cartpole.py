"""The mathematics of c51_cartpole.py: by the paper's loop, in closed form, on a chain by hand.

What dqn_cartpole.py has word for word, the loop among it, is tested there.
"""

import inspect
import itertools
import math

import c51_cartpole as script
import dqn_cartpole
import numpy as np
import pytest
import torch
from diary import Diary, check_settings, recorded, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --learning-starts 100 --buffer-size 700 --target-network-frequency 50 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 6000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-atoms 1", "--num-atoms"),
    ("--num-atoms 51.5", "--num-atoms"),
    ("--v-min 100", "--v-max"),
    ("--v-min -1 --v-max -2", "--v-max"),
    ("--v-max inf", "--v-max"),
    ("--v-min nan", "--v-min"),
    ("--learning-starts 32", "--batch-size"),
]
LEARNS = [("--seed 1 --total-timesteps 30000", 45)]  # twice chance; whole runs are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 481 (500k)",
    "Acrobot-v1": "CleanRL -88 (500k)",
    "MountainCar-v0": "CleanRL -166 (500k)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 40_000,
    "first": 11_000,  # all programs learn from step 10,000 on, and rarely act at random
    "peers": {
        "CleanRL's c51.py": {
            "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05",
            # Its layers have 120 and 84 units: they get the 128 of ours.
            "replace": {
                "prod(), 120": "prod(), 128",
                "Linear(120, 84": "Linear(128, 128",
                "Linear(84": "Linear(128",
            },
            "equal": "one environment, compiled",
        },
    },
    "flags": "--num-atoms 101 --v-min -100 --v-max 100 --learning-starts 10000 --start-e 0.05 "
    "--end-e 0.05 --buffer-size 10000 --train-frequency 10 --target-network-frequency 500 "
    "--batch-size 128 --hidden-size 128 --learning-rate 2.5e-4 --no-anneal-lr",
    "variants": {
        "ten environments, compiled": "--num-envs 10 --compile",
        "ten environments": "--num-envs 10",
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "12000 16000 --num-envs 10"},
}

# ---- project -------------------------------------------------------------------------------------


def by_the_papers_loop(probs, v_min, v_max, rewards, terminated, gamma):
    """Algorithm 1, atom by atom. It leaves out that l = u loses the mass; here the atom keeps it."""
    rows, dz = [], (v_max - v_min) / (len(probs[0]) - 1)
    for row, reward, ended in zip(probs.tolist(), rewards.tolist(), terminated.tolist()):
        m = [0.0] * len(row)
        for j, p in enumerate(row):
            value = reward if ended else reward + gamma * (v_min + j * dz)
            b = (min(max(value, v_min), v_max) - v_min) / dz
            lower, upper = math.floor(b), math.ceil(b)
            if lower == upper:
                m[lower] += p
            else:
                m[lower] += p * (upper - b)
                m[upper] += p * (b - lower)
        rows.append(m)
    return torch.tensor(rows, dtype=torch.float64)


def case(v_min, v_max, num_atoms, dtype):
    """Random distributions, also certain ones; rewards of any size, and of whole and half atoms."""
    torch.manual_seed(0)
    span, atoms = v_max - v_min, torch.linspace(v_min, v_max, num_atoms, dtype=torch.float64)
    rewards = torch.cat([
        0.1 * span * torch.randn(200), span * torch.randn(200), torch.zeros(20), -atoms, 2 * atoms,
        span / (num_atoms - 1) * torch.arange(-100, 100) / 2,
    ])  # fmt: skip
    count = len(rewards)
    probs = torch.softmax(5 * torch.randn(count, num_atoms, dtype=torch.float64), 1)
    probs[::7] = torch.eye(num_atoms).double()[torch.randint(num_atoms, (len(probs[::7]),))]
    return probs.to(dtype), atoms.to(dtype), rewards.to(dtype), torch.rand(count) < 0.3


RANGES = [(-10, 10, 51), (0, 100, 51), (-100, 0, 51), (-7, 1, 33), (0, 4, 5), (-1.5, 2, 2)]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("v_min, v_max, num_atoms", RANGES)
def test_projection_is_that_of_the_papers_loop(v_min, v_max, num_atoms, gamma):
    probs, atoms, rewards, terminated = case(v_min, v_max, num_atoms, torch.float64)
    found = script.project(probs, atoms, rewards, terminated, gamma)
    expected = by_the_papers_loop(probs, v_min, v_max, rewards, terminated, gamma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("v_min, v_max, num_atoms", RANGES)
def test_no_mass_is_lost_and_the_mean_is_dqns_target(v_min, v_max, num_atoms, gamma):
    """Mass 1 in the precision of the training; the mean where nothing is clipped."""
    probs, atoms, rewards, terminated = case(v_min, v_max, num_atoms, torch.float32)
    found = script.project(probs, atoms, rewards, terminated, gamma)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(len(rewards)), rtol=0, atol=1e-5)
    follows = gamma * ~terminated[:, None] * atoms + rewards[:, None]
    inside = ((follows >= v_min) & (follows <= v_max)).all(1)
    assert inside.sum() > 10
    target = rewards + gamma * (probs @ atoms) * ~terminated
    tolerance = 1e-5 * (v_max - v_min)
    torch.testing.assert_close((found @ atoms)[inside], target[inside], rtol=0, atol=tolerance)


@pytest.mark.parametrize("reward, gamma, terminated, expected", [
    (0.0, 1.0, False, [0.1, 0.2, 0.3, 0.4]),  # each on its own atom
    (1.0, 1.0, False, [0.0, 0.1, 0.2, 0.7]),  # each on the next one; the last is clipped
    (-1.0, 1.0, False, [0.3, 0.3, 0.4, 0.0]),
    (0.25, 1.0, False, [0.075, 0.175, 0.275, 0.475]),
    (9.0, 0.5, False, [0, 0, 0, 1]), (-9.0, 0.5, False, [1, 0, 0, 0]),
    (0.0, 0.5, False, [0.1 + 0.1, 0.1 + 0.3 + 0.2, 0.2, 0]),  # on 0, 1/2, 1 and 3/2
    (2.0, 0.5, True, [0, 0, 1, 0]), (0.0, 0.5, True, [1, 0, 0, 0]), (3.0, 1.0, True, [0, 0, 0, 1]),
    (1.75, 0.5, True, [0, 0.25, 0.75, 0]), (-2.0, 0.5, True, [1, 0, 0, 0]),
])  # fmt: skip
def test_projection_by_hand(reward, gamma, terminated, expected):
    """On the atoms 0, 1, 2, 3."""
    probs, atoms = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.arange(4.0)
    ended = torch.tensor([terminated])
    found = script.project(probs, atoms, torch.tensor([reward]), ended, gamma)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


def test_discounts_may_differ_by_row():
    """As they do over n steps."""
    probs, atoms, rewards, terminated = case(-10, 10, 51, torch.float32)
    gammas = torch.rand(len(rewards), 1)
    found = script.project(probs, atoms, rewards, terminated, gammas)
    for k in range(0, len(rewards), 10):
        row = (probs[k : k + 1], atoms, rewards[k : k + 1], terminated[k : k + 1], gammas[k].item())
        torch.testing.assert_close(found[k : k + 1], script.project(*row))


# ---- update --------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits (S, K, M) of the states and actions. An observation is a state, one-hot."""

    def __init__(self, logits, atoms):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits).double().clone())
        self.atoms = torch.as_tensor(atoms).double()

    def forward(self, obs):
        return torch.einsum("bs,skm->bkm", obs, self.logits)


def batch_of(states, transitions):
    """Of (state, action, reward, next state, terminated)."""
    eye = torch.eye(states, dtype=torch.float64)
    state, action, reward, following, terminated = map(torch.tensor, zip(*transitions))
    return script.Batch(eye[state], action, reward.double(), eye[following], terminated)


def test_one_step_down_the_gradient_of_the_definition():
    """The target's a* is the target network's own; p and m by loops; d loss / d logits = p - m."""
    torch.manual_seed(0)
    atoms, gamma = [-1.0, 0.0, 1.0, 2.0, 3.0], 0.9
    q_network, target_network = (Table(2 * torch.randn(6, 3, 5), atoms) for _ in range(2))
    transitions = [
        (s, a, float(torch.randn(())), int(torch.randint(6, ())), bool(torch.rand(()) < 0.3))
        for s in range(6) for a in range(3)
    ]  # fmt: skip
    batch, before = batch_of(6, transitions), target_network.logits.detach().clone()
    leaf = q_network.logits.detach().clone().requires_grad_()
    loss, mean, gradient = 0, 0, torch.zeros(6, 3, 5, dtype=torch.float64)
    for s, a, reward, following, terminated in transitions:
        weights = before.exp() / before.exp().sum(2, keepdim=True)
        means = [sum(p * z for p, z in zip(row, atoms)) for row in weights[following]]
        probs = weights[following, max(range(3), key=means.__getitem__)]
        step = probs[None], -1, 3, torch.tensor([reward]), torch.tensor([terminated]), gamma
        (m,) = by_the_papers_loop(*step)
        p = leaf[s, a].exp() / leaf[s, a].exp().sum()
        loss = loss - (m * p.log()).sum() / len(transitions)
        mean += (p.detach() @ torch.tensor(atoms).double()).item() / len(transitions)
        gradient[s, a] += (p.detach() - m) / len(transitions)
    loss.backward()
    torch.testing.assert_close(leaf.grad, gradient)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=2.0)
    q_network.logits.grad = torch.ones(6, 3, 5).double()  # what is left over is no matter
    metrics = script.update(q_network, target_network, optimizer, batch, script.Args(gamma=gamma))
    torch.testing.assert_close(q_network.logits.detach(), leaf.detach() - 2 * leaf.grad)
    assert target_network.logits.grad is None and torch.equal(target_network.logits, before)
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({"losses/td_loss": loss.item(), "losses/q_values": mean})
    assert not any(value.requires_grad for value in metrics.values())


def test_the_best_action_is_that_of_the_best_mean():
    """Not of the likeliest atom, of the highest one, or of the Q-network: see its target m."""
    probs = torch.tensor([
        [0.30, 0.25, 0.25, 0.20],  # mean 1.35
        [0.45, 0.00, 0.00, 0.55],  # mean 1.65, the most mass on one atom
        [0.00, 0.25, 0.50, 0.25],  # mean 2
    ]).double()  # fmt: skip
    atoms = torch.arange(4.0).double()
    log_probs = (probs + 1e-12).log()
    torch.testing.assert_close(
        script.expected_return(log_probs, atoms), torch.tensor([1.35, 1.65, 2.0]).double()
    )
    q_network, target_network = Table(log_probs[None].flip(1), atoms), Table(log_probs[None], atoms)
    batch = batch_of(1, [(0, 0, 0.0, 0, False)])
    optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
    script.update(q_network, target_network, optimizer, batch, script.Args(gamma=1.0))
    step = log_probs[2] - q_network.logits[0, 0]  # p - m, where both are those of the third
    torch.testing.assert_close(step, torch.zeros(4).double(), rtol=0, atol=1e-9)
    assert script.expected_return(q_network.logits[0], atoms).tolist() == pytest.approx(
        [2.0, 1.65, 1.35]
    )


def test_a_terminated_transition_is_worth_its_reward_and_a_truncated_one_more():
    """After it, the return is certainly 4."""
    atoms = torch.arange(0, 5.0).double()
    certain = torch.full((1, 1, 5), -50.0).double()
    certain[..., 4] = 50
    for terminated, expected in (True, [0, 1, 0, 0, 0]), (False, [0, 0, 0, 1, 0]):
        q_network, target_network = Table(torch.zeros(1, 1, 5), atoms), Table(certain, atoms)
        batch = batch_of(1, [(0, 0, 1.0, 0, terminated)])
        optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
        script.update(q_network, target_network, optimizer, batch, script.Args(gamma=0.5))
        m = q_network.logits[0, 0] + 0.2  # logits 0 - (1/5 - m)
        torch.testing.assert_close(m, torch.tensor(expected).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma, expected", [
    (1.0, {0: 1 / 8, 1: 3 / 8, 2: 3 / 8, 3: 1 / 8}),  # binomial
    (0.5, {eighth / 4: 1 / 8 for eighth in range(8)}),  # r0 + r1 / 2 + r2 / 4: each once
])  # fmt: skip
def test_updates_find_the_distribution_of_the_return(gamma, expected):
    """Three flips of a coin that pays 0 or 1, and an action that surely pays a quarter."""
    flips = [(s, 0, coin, min(s + 1, 2), s == 2) for s in range(3) for coin in (0.0, 1.0)]
    process = flips + [(s, 1, 0.25, min(s + 1, 2), s == 2) for s in range(3) for _ in range(2)]
    atoms = torch.arange(0, 3.25, 0.25)
    q_network, target_network = (Table(torch.zeros(3, 2, 13), atoms) for _ in range(2))
    optimizer, batch = torch.optim.SGD(q_network.parameters(), lr=10.0), batch_of(3, process)
    for _ in range(3000):
        script.update(q_network, target_network, optimizer, batch, script.Args(gamma=gamma))
        script.update_target(target_network, q_network, 1.0)
    found = dict(zip(atoms.tolist(), q_network.logits[0, 0].softmax(0).tolist()))
    assert found == pytest.approx({z: expected.get(z, 0) for z in found}, abs=2e-3)
    final = dict(zip(atoms.tolist(), q_network.logits[2, 1].softmax(0).tolist()))
    assert final[0.25] == pytest.approx(1, abs=2e-3)


# ---- QNetwork, Actor -----------------------------------------------------------------------------


def network_of(obs_size=4, num_actions=3, hidden_size=8, v_min=-2.0, v_max=3.0, num_atoms=11):
    return script.QNetwork(
        obs_size, num_actions, hidden_size, torch.linspace(v_min, v_max, num_atoms)
    )


def test_logits_and_atoms():
    network = network_of()
    assert [tuple(weights.shape) for weights in network.parameters()] == [
        (8, 4), (8,), (8, 8), (8,), (33, 8), (33,)
    ]  # fmt: skip
    assert sum(isinstance(part, nn.ReLU) for part in network.layers) == 2
    with torch.no_grad():
        network.layers[-1].weight.zero_()
        network.layers[-1].bias[:] = torch.arange(33)
    assert torch.equal(network(torch.randn(5, 4))[3], torch.arange(33.0).reshape(3, 11))
    assert "atoms" not in network.state_dict()  # else a resumed run could not have others
    np.testing.assert_allclose(network.atoms, np.arange(-2, 3.1, 0.5))


def test_the_networks_of_a_run_have_the_atoms_of_its_arguments():
    args = script.Args(v_min=-3.0, v_max=1.0, num_atoms=5)
    envs = script.Envs(args, 1, script.TRAINING)
    network = script.make_network(args, envs)
    envs.close()
    assert network.atoms.tolist() == [-3, -2, -1, 0, 1]
    assert network(torch.zeros(7, 4)).shape == (7, 2, 5)


@pytest.mark.parametrize("scale", [1, 3000])
def test_the_actor_is_the_mean_of_the_q_network_also_after_an_update(scale):
    """Logits of any size. And the evaluation is greedy."""
    torch.manual_seed(0)
    q_network, obs = network_of(), torch.randn(50, 4)
    with torch.no_grad():
        q_network.layers[-1].weight *= scale
    actor = script.Actor(q_network)
    for _ in range(2):
        logits = q_network(obs).detach()
        q_values = torch.distributions.Categorical(logits=logits).probs @ q_network.atoms
        np.testing.assert_allclose(actor(obs.numpy()), q_values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(script.expected_return(logits, q_network.atoms), q_values)
        best = script.play(script.Args(), q_network, obs.numpy())
        greatest = q_values.gather(1, torch.tensor(best)[:, None]).squeeze(1)
        torch.testing.assert_close(greatest, q_values.max(1).values, rtol=0, atol=1e-3)
        assert len(set(best.tolist())) > 1
        with torch.no_grad():
            for weights in q_network.parameters():
                weights += 0.3 * torch.randn_like(weights)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=1200, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, target_network_frequency=40,
    eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2, num_atoms=21, v_min=-5.0,
    v_max=5.0,
)  # fmt: skip


def test_the_loop_is_that_of_dqn_cartpole():
    """Where it is tested. What it calls is another function only where it has to be."""
    same = "train evaluate play act linear_epsilon update update_target Batch ReplayBuffer make_env"
    for name in same.split():
        ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, dqn_cartpole))
        assert ours == theirs, name


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """By a network that is first made from the seed; in the evaluation by the one that is saved."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW | {"start_e": 0.0, "end_e": 0.0, "seed": 3})
    chosen = {}
    for (_, obs, *_), actions in acts:
        chosen |= {tuple(row): action for row, action in zip(obs.tolist(), actions.tolist())}
    steps = [step for env in Diary.made for step in env.steps]
    assert all(chosen[tuple(before)] == action for before, action, *_ in steps)
    torch.manual_seed(3)
    first = network_of(2, 3, 16, -5.0, 5.0, 21).state_dict()
    for weights, ((actor, *_), _) in (first, acts[0]), (state["network"], acts[-1]):
        for expected, found in zip(weights.values(), itertools.chain(*actor.layers), strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(actor.atoms, np.arange(-5, 5.1, 0.5), atol=1e-6)


@pytest.mark.parametrize("env_id, value", [
    ("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma), 5; at first, it is worth 10.

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"batch_size": 64, "learning_starts": 64, "v_min": 0.0, "v_max": 20.0}
    state, _ = train(script, tmp_path, **FEW | flags)
    q_network = network_of(1, 2, 16, 0.0, 20.0, 21)
    q_network.load_state_dict(state["network"])
    found = script.Actor(q_network)(np.ones((1, 1), np.float32))
    np.testing.assert_allclose(found, np.full((1, 2), value), rtol=0.05)


def test_the_least_settings_are_allowed():
    script.Args(num_atoms=2, v_min=-1e-3, v_max=0.0)
    for change in ({"num_atoms": 1}, {"v_max": 0.0}, {"v_max": -1.0}, {"v_min": 1e10}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            script.Args(**change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "num_atoms": 20, "v_min": -4.0, "v_max": 4.0, "tau": 0.5,
        "target_network_frequency": 50, "batch_size": 15, "start_e": 0.9, "end_e": 0.5,
        "exploration_fraction": 0.2, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip
