"""The mathematics of mdqn_cartpole.py: by hand, against its definition, at its fixed point.

What dqn_cartpole.py has word for word, the loop among it, is tested there.
"""

import inspect
import math

import dqn_cartpole
import mdqn_cartpole as script
import numpy as np
import pytest
import torch
from diary import check_settings, train
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
    ("--temperature 0", "--temperature"),
    ("--munchausen-alpha 1.5", "--munchausen-alpha"),
    ("--munchausen-floor 0.5", "--munchausen-floor"),
    ("--munchausen-floor nan", "--munchausen-floor"),
    ("--learning-starts 32", "--batch-size"),
]
LEARNS = []  # the loop is that of DQN, which learns in its test

# ---- soft_value, munchausen_bonus, soft_td_target ------------------------------------------------


def policy(q_values, temperature):
    """softmax, from its definition: a list of probabilities."""
    weights = [math.exp((q - max(q_values)) / temperature) for q in q_values]
    return [weight / sum(weights) for weight in weights]


def value(q_values, temperature):
    """Mean of Q - temperature * log pi, over pi."""
    probs = policy(q_values, temperature)
    return sum(p * (q - temperature * math.log(p)) for p, q in zip(probs, q_values))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_value_is_the_mean_of_q_and_entropy(temperature):
    q_values = 2 * torch.randn(50, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    expected = torch.tensor([value(row, temperature) for row in q_values.tolist()]).double()
    torch.testing.assert_close(script.soft_value(q_values, temperature), expected)


def test_value_between_the_maximum_and_the_entropy_of_all_actions():
    """And at a low temperature, with large values, no number is infinite."""
    q_values = torch.tensor([[-3000.0, 4000.0, 3999.0], [7.0, 7.0, 7.0]])
    found = script.soft_value(q_values, 0.03)
    np.testing.assert_allclose(found, [4000, 7 + 0.03 * math.log(3)], rtol=1e-6)


@pytest.mark.parametrize("alpha, floor", [(0.9, -1.0), (0.5, -0.2), (1.0, -1e9), (0.0, -1.0)])
def test_bonus_is_the_clipped_log_probability(alpha, floor):
    q_values = 2 * torch.randn(60, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    actions = torch.arange(60) % 3
    expected = []
    for row, action in zip(q_values.tolist(), actions.tolist()):
        log_prob = math.log(policy(row, 0.7)[action])
        expected.append(alpha * max(0.7 * log_prob, floor))
    args = script.Args(temperature=0.7, munchausen_alpha=alpha, munchausen_floor=floor)
    found = script.munchausen_bonus(q_values, actions, args)
    torch.testing.assert_close(found, torch.tensor(expected).double())
    assert (found <= 0).all()


def test_bonus_by_hand():
    """A sure action costs nothing, a hopeless one the floor, one of two alike log 2."""
    q_values = torch.tensor([[9.0, 0.0], [9.0, 0.0], [4.0, 4.0]])
    found = script.munchausen_bonus(q_values, torch.tensor([0, 1, 1]), script.Args())
    np.testing.assert_allclose(found, [0, -0.9, -0.9 * 0.03 * math.log(2)], atol=1e-6)


def test_target_by_hand():
    next_q = torch.tensor([[2.0, 2.0], [9.0, -9.0], [5.0, 5.0]])
    rewards, terminated = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([False, False, True])
    found = script.soft_td_target(rewards, terminated, next_q, 0.5, 1.0)
    np.testing.assert_allclose(found, [1 + 0.5 * (2 + math.log(2)), 4.5, 3.0], rtol=1e-6)


# ---- update --------------------------------------------------------------------------------------


class Table(nn.Module):
    """A number for each state and action. An observation is a state, one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q).double().clone())

    def forward(self, obs):
        return obs @ self.q


def batch_of(states, transitions):
    """Of (state, action, reward, next state, terminated)."""
    eye = torch.eye(states, dtype=torch.float64)
    state, action, reward, following, terminated = map(torch.tensor, zip(*transitions))
    return script.Batch(eye[state], action, reward.double(), eye[following], terminated)


def random_process(seed):
    """6 states, 3 actions, rewards and ways at random; about a quarter of the steps terminate."""
    random = np.random.default_rng(seed)
    return [
        (s, a, random.normal(), int(random.integers(6)), bool(random.random() < 0.25))
        for s in range(6) for a in range(3)
    ]  # fmt: skip


def test_one_step_down_the_gradient_of_the_definition():
    """The policy, and all of the target, are the target network's. Nothing else changes."""
    torch.manual_seed(0)
    transitions = random_process(1)
    q_network, target_network = (Table(torch.randn(6, 3)) for _ in range(2))
    before, old = (network.q.detach().clone() for network in (q_network, target_network))
    args = script.Args(gamma=0.9, temperature=0.4, munchausen_alpha=0.8, munchausen_floor=-0.7)
    expected, loss, clipped = before.clone(), 0.0, 0
    for s, a, reward, following, terminated in transitions:
        scaled = 0.4 * math.log(policy(old[s].tolist(), 0.4)[a])
        clipped += scaled < -0.7
        y = reward + 0.8 * max(scaled, -0.7)
        y += 0 if terminated else 0.9 * value(old[following].tolist(), 0.4)
        error = y - before[s, a].item()
        expected[s, a] += 3.0 * 2 * error / 18
        loss += error**2 / 18
    assert 3 < clipped < 15
    optimizer = torch.optim.SGD(q_network.parameters(), lr=3.0)
    metrics = script.update(q_network, target_network, optimizer, batch_of(6, transitions), args)
    torch.testing.assert_close(q_network.q.detach(), expected)
    assert target_network.q.grad is None and torch.equal(target_network.q, old)
    found = {tag: value.item() for tag, value in metrics.items()}
    mean = before.mean().item()  # each state and action is there once
    assert found == pytest.approx({"losses/td_loss": loss, "losses/q_values": mean})
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_updates_find_the_policy_of_a_lower_temperature(alpha):
    """Where M-DQN comes to rest, pi is the best policy with (1 - alpha) times the entropy.

    With q = r + alpha * t * log pi + gamma * V', p = q - alpha * t * log pi obeys soft value
    iteration at the temperature (1 - alpha) * t, which is done here, and pi is its softmax. The
    bonus widens the gaps between actions by 1 / (1 - alpha).
    """
    process, gamma, temperature = random_process(2), 0.9, 0.6
    soft = np.zeros((6, 3))
    for _ in range(400):
        values = [value(row, (1 - alpha) * temperature) for row in soft.tolist()]
        for s, a, reward, following, terminated in process:
            soft[s, a] = reward + gamma * values[following] * (not terminated)
    q_network, target_network = Table(np.zeros((6, 3))), Table(np.zeros((6, 3)))
    # The gradient of the mean of 18 squares is the error / 9: in one step, Q becomes y.
    optimizer, batch = torch.optim.SGD(q_network.parameters(), lr=9.0), batch_of(6, process)
    args = script.Args(
        gamma=gamma, temperature=temperature, munchausen_alpha=alpha, munchausen_floor=-1e9
    )
    for _ in range(400):
        script.update(q_network, target_network, optimizer, batch, args)
        script.update_target(target_network, q_network, 1.0)
    q_values = q_network.q.detach()
    expected = [policy(row, (1 - alpha) * temperature) for row in soft.tolist()]
    found = [policy(row, temperature) for row in q_values.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gaps, plain = (q - q.max(1, keepdims=True) for q in (q_values.numpy(), soft))
    np.testing.assert_allclose(gaps, plain / (1 - alpha), atol=1e-5)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=1200, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, target_network_frequency=40,
    eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("name", [
    "train", "evaluate", "play", "act", "Actor", "QNetwork", "linear_epsilon", "update",
    "update_target", "Batch", "ReplayBuffer", "make_env", "make_network",
])  # fmt: skip
def test_what_dqn_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, dqn_cartpole))
    assert ours == theirs


@pytest.mark.parametrize("env_id, share", [("Truncates-v0", 1.0), ("Terminates-v0", 2 / 3)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, share):
    """Truncated for ever, q = 1 + alpha * t * log(1/2) + gamma * (q + t * log 2), of two actions.

    If every third step terminates, which the only state cannot foresee, two thirds of the last.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"batch_size": 64, "learning_starts": 64, "temperature": 1.0, "munchausen_alpha": 0.6}
    state, _ = train(script, tmp_path, **FEW | flags)
    q_network = script.QNetwork(1, 2, 16)
    q_network.load_state_dict(state["network"])
    found = q_network(torch.ones(1, 1)).detach()
    expected = (1 + (0.8 * share - 0.6) * math.log(2)) / (1 - 0.8 * share)
    torch.testing.assert_close(found, torch.full((1, 2), expected), rtol=0.06, atol=0)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "temperature": 0.1, "munchausen_alpha": 0.5,
        "munchausen_floor": -0.01, "tau": 0.5, "target_network_frequency": 50, "batch_size": 15,
        "start_e": 0.9, "end_e": 0.5, "exploration_fraction": 0.2, "learning_starts": 100,
        "train_frequency": 5, "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip
