"""The mathematics of pqn_cartpole.py: by hand, against brute force, against the network itself.

What it has word for word from dqn_cartpole.py is tested there: make_env, linear_epsilon.
"""

import inspect
import itertools
import math

import dqn_cartpole
import numpy as np
import pqn_cartpole as script
import pytest
import torch
from diary import Diary, check_episodes, check_settings, recorded, side_by_side, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-minibatches 2 --update-epochs 2 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 6", "--num-minibatches"),
    ("--q-lambda 1.01", "--q-lambda"),
    ("--end-e -0.01", "--end-e"),
    ("--max-grad-norm nan", "--max-grad-norm"),
    ("--buffer-size 1000", "--buffer-size"),  # DQN's
]
LEARNS = [("--seed 1", 195)]  # to tell learning from chance, which is 22
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 495 (500k)",
    "Acrobot-v1": "CleanRL -96 (500k)",
    "MountainCar-v0": "CleanRL -200 (500k)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 60_000,
    "first": 5_000,
    "peers": {
        "CleanRL's pqn.py": {
            "flags": "--start-e 0.05 --end-e 0.05",
            # Its layers have 120 and 84 units: they get the 128 of ours.
            "replace": {
                "prod(), 120": "prod(), 128",
                "LayerNorm(120": "LayerNorm(128",
                "Linear(120, 84": "Linear(128, 128",
                "LayerNorm(84": "LayerNorm(128",
                "Linear(84": "Linear(128",
            },
            "equal": "compiled",
        },
    },
    "flags": "--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 "
    "--hidden-size 128 --start-e 0.05 --end-e 0.05 --learning-rate 2.5e-4",
    "variants": {"compiled": "--compile", "not compiled": ""},
    "floors": {"floor": "1024 5120"},
}


@pytest.mark.parametrize("name", ["linear_epsilon", "make_env", "make_network"])
def test_what_dqn_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, dqn_cartpole))
    assert ours == theirs


# ---- q_lambda ------------------------------------------------------------------------------------


def random_rollout(num_steps=30, num_envs=4):
    """Random rewards, max_a Q(s_{t+1}, a) and ends; also steps that terminate and are truncated."""
    generator = np.random.default_rng(0)
    rewards, next_values = generator.normal(size=(2, num_steps, num_envs))
    terminated, truncated = generator.random((2, num_steps, num_envs)) < 0.12
    return rewards, next_values, terminated, truncated


@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_g_is_the_mean_of_all_n_step_returns(gamma, lam):
    """The forward view: (1 - lambda) * sum_n lambda^(n-1) * G^(n), and the rest to the longest.

    G^(n) = r_t + gamma r_{t+1} + ... + gamma^n max_a Q(s_{t+n}, a), as far as the episode goes.
    With lambda = 0, this is the target of DQN; with 1, the whole return, and Q after the rollout.
    """
    rewards, next_values, terminated, truncated = inputs = random_rollout()
    expected = np.zeros_like(rewards)
    for t, i in np.ndindex(rewards.shape):
        ends = np.flatnonzero(terminated[t:, i] | truncated[t:, i])
        longest = ends[0] + 1 if len(ends) else len(rewards) - t
        for n in range(1, longest + 1):
            last = t + n - 1
            total = sum(gamma**k * rewards[t + k, i] for k in range(n))
            total += 0 if terminated[last, i] else gamma**n * next_values[last, i]
            expected[t, i] += lam ** (n - 1) * (1 - lam if n < longest else 1) * total
    before = [column.copy() for column in inputs]
    found = script.q_lambda(*map(torch.from_numpy, inputs), gamma, lam)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert all(map(np.array_equal, inputs, before))  # they are still what they were


def test_the_recursion_starts_from_the_state_after_the_last_step():
    """gamma and lambda 0.5; rewards 0, 0, 1, 0; max_a Q of s_1 to s_4 is 1, 2, 4, 0.

        G_3 = 0 + 0.5 * max_a Q(s_4, a)               = 0
        G_2 = 1 + 0.5 * (0.5 * G_3 + 0.5 * 4)         = 2
        G_1 = 0 + 0.5 * (0.5 * G_2 + 0.5 * 2)         = 1
        G_0 = 0 + 0.5 * (0.5 * G_1 + 0.5 * 1)         = 0.5

    Four of the authors' five scripts without a recurrent network (purejaxql 47af6d7: all but
    pqn_atari.py) begin with the Q of s_4 where that of s_3 is due, the 4 in G_2, and get 1, 0.75
    and 0.4375 for G_2, G_1 and G_0: the two look alike where Q changes little.
    """
    rewards, next_values = torch.tensor([[0.0, 0, 1, 0], [1, 2, 4, 0]])[..., None]
    no = torch.zeros(4, 1, dtype=torch.bool)
    found = script.q_lambda(rewards, next_values, no, no, 0.5, 0.5)
    assert found.squeeze(1).tolist() == [0.5, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("lam, expected", [
    # Step 1 is truncated, step 3 terminated, step 4 the last one; gamma 0.5.
    (0.0, [1 + 2, 2 + 3, 3 + 0, 4, 5 + 4]),
    (0.5, [1 + 1 + 0.25 * 5, 2 + 3, 3 + 0 + 0.25 * 4, 4, 5 + 4]),
    (1.0, [1 + 0.5 * 5, 2 + 3, 3 + 0.5 * 4, 4, 5 + 4]),
])  # fmt: skip
def test_returns_by_hand_over_both_kinds_of_ends(lam, expected):
    rewards, next_values = torch.tensor([[1.0, 2, 3, 4, 5], [4, 6, 0, 100, 8]])[..., None]
    terminated, truncated = torch.zeros(2, 5, 1, dtype=torch.bool)
    terminated[3], truncated[1] = True, True
    found = script.q_lambda(rewards, next_values, terminated, truncated, 0.5, lam)
    assert found.squeeze(1).tolist() == expected


@pytest.mark.parametrize("kind", ["terminated", "truncated", "both"])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_nothing_leaks_across_an_end(kind, lam):
    """What follows the end changes no return before it; nor does another environment."""
    torch.manual_seed(0)
    rewards, next_values = torch.randn(2, 6, 2).double()
    terminated, truncated = torch.zeros(2, 6, 2, dtype=torch.bool)
    terminated[2, 0], truncated[2, 0] = kind != "truncated", kind != "terminated"
    found = script.q_lambda(rewards, next_values, terminated, truncated, 0.9, lam)
    rewards[3:, 0], next_values[3:, 0], truncated[4, 0] = 100, 100, True
    rewards[:, 1] = next_values[:, 1] = -100
    changed = script.q_lambda(rewards, next_values, terminated, truncated, 0.9, lam)
    assert torch.equal(found[:3, 0], changed[:3, 0])
    next_values[2, 0] = 100  # of the last observation: it counts only if the episode goes on there
    last = script.q_lambda(rewards, next_values, terminated, truncated, 0.9, lam)[2, 0]
    expected = rewards[2, 0].item() + (90 if kind == "truncated" else 0)
    assert last.item() == pytest.approx(expected)


# ---- The network and acting ----------------------------------------------------------------------


def test_layer_normalisation_stands_between_each_hidden_layer_and_its_activation():
    torch.manual_seed(0)
    network, obs = script.QNetwork(4, 3, 8), 5 * torch.randn(20, 4)
    weights = [w.detach().numpy() + 0.1 for w in network.parameters()]
    with torch.no_grad():  # so that no scale is 1 and no shift is 0
        for weight in network.parameters():
            weight += 0.1
    assert [w.shape for w in weights] == [(8, 4), (8,), (8,), (8,)] + [(8, 8), *[(8,)] * 3] + [
        (3, 8), (3,)
    ]  # fmt: skip
    expected = []
    for x in obs.double().numpy():
        for k in (0, 4):
            x = weights[k] @ x + weights[k + 1]
            x = (x - sum(x) / 8) / math.sqrt(sum((x - sum(x) / 8) ** 2) / 8 + 1e-5)
            x = np.maximum(weights[k + 2] * x + weights[k + 3], 0)
        expected.append(weights[8] @ x + weights[9])
    np.testing.assert_allclose(network(obs).detach(), expected, rtol=1e-4, atol=1e-5)
    assert network(torch.randn(7, 5, 4)).shape == (7, 5, 3)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3, 1e6])
def test_the_actor_is_the_q_network_also_after_an_update_and_on_large_inputs(scale):
    """And the evaluation is greedy. A row of equal numbers has the variance 0, and a finite Q."""
    torch.manual_seed(0)
    q_network, obs = script.QNetwork(4, 3, 12), scale * torch.randn(50, 4)
    actor = script.Actor(q_network)
    for _ in range(2):
        q_values = q_network(obs).detach()
        np.testing.assert_allclose(actor(obs.numpy()), q_values, rtol=1e-4, atol=1e-5)
        assert actor(obs.numpy()).dtype == np.float32
        found = script.play(script.Args(), q_network, obs.numpy())
        assert found.tolist() == q_values.argmax(1).tolist()
        assert scale < 1 or len(set(found)) > 1
        with torch.no_grad():
            for weights in q_network.parameters():
                weights += 0.3 * torch.randn_like(weights)


def likes(obs):
    """The action of the largest value is the observation's first number, modulo 3."""
    return 2 * np.eye(3)[obs[:, 0].astype(int) % 3] - 1


def test_actions_are_greedy_where_none_is_given():
    obs = np.tile(np.float32([[2], [0], [1], [5]]), (50, 1))
    assert script.act(likes, obs).tolist() == [2, 0, 1, 2] * 50
    explore = np.tile([-1, 2, -1, 0], 50)
    assert script.act(likes, obs, explore).tolist() == [2, 2, 1, 0] * 50


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_is_the_probability_of_any_action_for_each_step_apart(epsilon):
    torch.manual_seed(0)
    explore = script.random_actions(epsilon, 3, 10_000, 4)
    assert explore.shape == (10_000, 4)
    shares = np.bincount(explore.ravel() + 1, minlength=4) / 40_000
    np.testing.assert_allclose(shares, [1 - epsilon, *[epsilon / 3] * 3], atol=0.01)
    for a, b in ((explore[1:], explore[:-1]), (explore[:, 1:], explore[:, :-1])):
        assert ((a == 0) & (b == 0)).mean() == pytest.approx((epsilon / 3) ** 2, abs=0.01)


# ---- The loss and its update ---------------------------------------------------------------------


class Table(nn.Module):
    """A number for each state and action. An observation is a state, one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q).double().clone())

    def forward(self, obs):
        return obs @ self.q


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.5])
def test_update_takes_one_step_down_the_gradient_and_reports(limit):
    """Q(0, 1) = 3, G = 5; Q(1, 0) = 7, G = 4. The gradient, (-2, 3), is clipped as one vector."""
    q_network = Table([[1.0, 3.0], [7.0, 8.0]])
    returns = torch.tensor([5.0, 4.0]).double()
    batch = script.Batch(torch.eye(2).double(), torch.tensor([1, 0]), returns)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.1)
    q_network.q.grad = torch.ones(2, 2).double()  # what is left over is no matter
    metrics = script.update(q_network, optimizer, batch, script.Args(max_grad_norm=limit))
    share = 0.5 / math.sqrt(2**2 + 3**2) if limit == 0.5 else 1
    expected = torch.tensor([[1.0, 3 + 0.1 * 2 * share], [7 - 0.1 * 3 * share, 8.0]]).double()
    torch.testing.assert_close(q_network.q.detach(), expected, rtol=0, atol=1e-6)
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({"losses/td_loss": (2**2 + 3**2) / 2, "losses/q_values": 5.0})
    assert not any(value.requires_grad for value in metrics.values())


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    gradients = []
    for limit in (1e9, 0.01):
        torch.manual_seed(0)
        q_network = script.QNetwork(2, 3, 8)
        batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, torch.randn(8))
        script.compute_gradient(q_network, batch, script.Args(max_grad_norm=limit))
        gradients.append(torch.cat([w.grad.flatten() for w in q_network.parameters()]))
    assert gradients[0].norm() > 0.1
    expected = 0.01 * gradients[0] / gradients[0].norm()
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_the_definition():
    """Of the mean of the B squares, row by row, by central differences on all weights."""
    torch.manual_seed(0)
    q_network = script.QNetwork(2, 3, 4).double()
    batch = script.Batch(torch.randn(6, 2).double(), torch.arange(6) % 3, torch.randn(6).double())

    def loss():
        rows = zip(*batch)
        return sum((q_network(s[None])[0, a] - g).item() ** 2 for s, a, g in rows) / 6

    script.compute_gradient(q_network, batch, script.Args(max_grad_norm=0.0))
    for weights in q_network.parameters():
        for place in np.ndindex(weights.shape):
            kept, losses = weights.data[place].item(), []
            for change in (1e-6, -1e-6):
                weights.data[place] = kept + change
                losses.append(loss())
            weights.data[place] = kept
            slope = (losses[0] - losses[1]) / 2e-6
            assert weights.grad[place].item() == pytest.approx(slope, abs=1e-6)


def test_returns_and_updates_find_the_values_of_value_iteration():
    """6 states, 3 actions, rewards and ways at random; about a quarter of the steps terminate.

    Each step is a rollout of its own, with lambda = 0.
    """
    random, expected = np.random.default_rng(0), np.zeros((6, 3))
    state, action = np.divmod(np.arange(18), 3)
    reward, following = random.normal(size=18), random.integers(6, size=18)
    terminated, eye = random.random(18) < 0.25, torch.eye(6).double()
    rollout = eye[state], torch.from_numpy(action), torch.from_numpy(reward), eye[following]
    ends = torch.from_numpy(terminated), torch.zeros(18, dtype=torch.bool)
    args, q_network = script.Args(gamma=0.9, q_lambda=0.0, max_grad_norm=0.0), Table(expected)
    # The gradient of the mean of 18 squares is the error / 9: in one step, Q becomes G.
    optimizer = torch.optim.SGD(q_network.parameters(), lr=9.0)
    for _ in range(300):
        targets = reward + 0.9 * expected.max(1)[following] * ~terminated
        expected[state, action] = targets
        columns = [column[None] for column in (*rollout, *ends)]
        script.update(q_network, optimizer, script.make_batch(q_network, *columns, args), args)
    np.testing.assert_allclose(q_network.q.detach(), expected, atol=1e-6)


@pytest.mark.parametrize("size, parts, epochs", [(12, 4, 3), (13, 4, 2), (5, 1, 2), (5, 5, 2)])
def test_every_epoch_learns_from_every_step_once_in_a_new_order(monkeypatch, size, parts, epochs):
    seen = []

    def update(q_network, optimizer, batch, args):
        assert all(torch.equal(part, batch.obs) for part in batch)  # rows stay together
        seen.append(batch.obs.int().tolist())
        return {"losses/td_loss": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_minibatches=parts, update_epochs=epochs)
    batch = script.Batch(*[torch.arange(size).double()] * 3)
    metrics = script.learn(None, None, batch, args)
    assert len(seen) == parts * epochs and max(map(len, seen)) - min(map(len, seen)) <= 1
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(size))}) == epochs + 1
    assert metrics["losses/td_loss"].item() == pytest.approx((len(seen) + 1) / 2)  # their mean


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, hidden_size=16, eval_episodes=2, exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (1, 7)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps):
    """Also where an episode ends: its last observation, not the next one's first."""
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"num_envs": num_envs, "num_steps": num_steps}
    state, points = train(script, tmp_path, **flags)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds and len(steps) == rounds * num_envs * num_steps
    assert state["envs"]["steps"] == len(steps)
    for number, ((_, *rollout, _), _) in enumerate(calls):
        for i in range(num_envs):
            happened = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    check_episodes(points, steps)


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """By the network as it was at the start of the rollout, or at random, as epsilon says."""
    drawn = recorded(monkeypatch, script, "random_actions")
    batches = recorded(monkeypatch, script, "make_batch")
    train(script, tmp_path, **FEW | {"start_e": 0.8, "end_e": 0.2})
    assert len(drawn) == len(batches) == 10
    for k, ((arguments, explore), ((q_network, obs, actions, *_), _)) in enumerate(
        zip(drawn, batches)
    ):
        assert arguments == (pytest.approx(max(0.2, 0.8 - 0.6 * k / 5)), 3, 20, 3)
        greedy = q_network(obs).argmax(-1).numpy()
        assert np.array_equal(actions, np.where(explore >= 0, explore, greedy))
        assert (actions.numpy() != greedy).any()


def test_a_batch_is_every_step_with_its_return(tmp_path, monkeypatch):
    """By the network that played, before all epochs: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    train(script, tmp_path, **FEW | {"seed": 3, "gamma": 0.7, "q_lambda": 0.6})
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    q_network = script.QNetwork(2, 3, 16)
    next_values = q_network(next_obs).max(-1).values
    returns = script.q_lambda(rewards, next_values, terminated, truncated, 0.7, 0.6)
    _, _, batch, _ = learned[0][0]
    for part, expected in zip(batch, (obs, actions, returns), strict=True):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_schedules_are_logged_after_each_rollout(tmp_path, monkeypatch, anneal_lr):
    learned = recorded(monkeypatch, script, "learn")
    _, points = train(script, tmp_path, **FEW, anneal_lr=anneal_lr)
    for k, ((_, optimizer, _, _), metrics) in enumerate(learned):
        rate = 1e-2 * (1 - k / 10 if anneal_lr else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        epsilon = max(0.05, 1 - 0.95 * k / 5)
        metrics |= {"charts/learning_rate": rate, "charts/epsilon": epsilon}
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag
    assert type(optimizer) is torch.optim.RAdam and len(learned) == 10


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_is_not_saved(tmp_path, monkeypatch, where):
    count, update = itertools.count(1), script.update

    def spoil(q_network, *others):
        number, metrics = next(count), update(q_network, *others)
        if where == "loss" and number == 2:  # of the four of the first rollout
            return metrics | {"losses/td_loss": torch.tensor(math.nan)}
        if where == "weight" and number == 4:
            next(q_network.parameters()).data[0, 0] = math.inf
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW, checkpoint_frequency=60)
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0


@pytest.mark.parametrize("env_id", ["Truncates-v0", "Terminates-v0"])
@pytest.mark.parametrize("lam", [0.0, 0.65, 1.0])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, lam):
    """Truncated for ever, a reward of 1 is worth v = 1 / (1 - 0.8) = 5, whatever lambda is.

    If every third step terminates, which the only state cannot foresee, v is the mean of
    G_2 = 1, G_1 = 1 + 0.8 * (lambda * 1 + (1 - lambda) * v) and G_0, which is like G_1 of G_1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "q_lambda": lam, "total_timesteps": 3000}
    state, _ = train(script, tmp_path, **FEW | flags | {"num_steps": 21, "update_epochs": 10})
    q_network, value = script.QNetwork(1, 2, 16), 5.0
    if env_id == "Terminates-v0":
        for _ in range(100):
            following, returns = 1.0, [1.0]
            for _ in range(2):
                following = 1 + 0.8 * (lam * following + (1 - lam) * value)
                returns.append(following)
            value = sum(returns) / 3
    q_network.load_state_dict(state["network"])
    found = q_network(torch.ones(1, 1)).detach()
    torch.testing.assert_close(found, torch.full((1, 2), value), rtol=0.05, atol=0)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "q_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "max_grad_norm": 0.01, "start_e": 0.9, "end_e": 0.5, "exploration_fraction": 0.2,
        "hidden_size": 15,
    })  # fmt: skip


def test_a_minibatch_may_be_a_single_step():
    script.Args(num_envs=1, num_steps=5, num_minibatches=5)
    with pytest.raises(ValueError, match="--num-minibatches"):
        script.Args(num_envs=1, num_steps=5, num_minibatches=6)
