"""The mathematics of sac_cartpole.py: by hand, against soft value iteration and Categorical.

What dqn_cartpole.py and reinforce_cartpole.py have word for word is tested there.
"""

import inspect
import math

import dqn_cartpole
import numpy as np
import pytest
import reinforce_cartpole
import sac_cartpole as script
import torch
from diary import Diary, check_episodes, check_settings, recorded, side_by_side, train
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --learning-starts 100 --buffer-size 700 --train-frequency 4 "
    "--gradient-steps 2 --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 6000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--learning-starts 32", "--batch-size"),
    ("--buffer-size 999", "--learning-starts"),
    ("--total-timesteps 1000", "--learning-starts"),
    ("--target-entropy 1.1", "--target-entropy"),
    ("--alpha -0.1", "--alpha"),
    ("--tau nan", "--tau"),
]
LEARNS = [("--total-timesteps 10000", 100)]  # chance: 22


@pytest.mark.parametrize("other, name", [
    (dqn_cartpole, "ReplayBuffer"), (dqn_cartpole, "Batch"), (dqn_cartpole, "update_target"),
    (dqn_cartpole, "make_env"), (reinforce_cartpole, "act"), (reinforce_cartpole, "gumbel_noise"),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(other, name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- The policy ----------------------------------------------------------------------------------


def make_agent(obs_size=2, num_actions=3, hidden_size=16, seed=0):
    torch.manual_seed(seed)
    return script.Agent(obs_size, num_actions, hidden_size)


def test_the_actor_is_the_policy_also_after_an_update():
    """It samples; the evaluation takes the most probable action."""
    agent, obs = make_agent(), torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        log_pi = agent(obs).detach()
        torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(50))
        found = torch.from_numpy(actor(obs.numpy())).log_softmax(1)
        torch.testing.assert_close(found, log_pi, rtol=1e-4, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        assert played.tolist() == log_pi.argmax(1).tolist() and len(set(played)) > 1
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)
    rows = np.tile(obs[:1].numpy(), (40_000, 1))
    samples = script.act(actor, rows, script.gumbel_noise(40_000, 3))
    shares = np.bincount(samples, minlength=3) / 40_000
    np.testing.assert_allclose(shares, agent(obs[:1])[0].exp().detach(), atol=0.01)


def test_hidden_size_is_the_width_of_both_layers_of_three_networks():
    agent = make_agent(hidden_size=8)
    for network in agent.actor, *agent.critics.networks:
        shapes = [tuple(weights.shape) for weights in network.parameters()]
        assert shapes == [(8, 2), (8,), (8, 8), (8,), (3, 8), (3,)]
        assert sum(isinstance(part, nn.ReLU) for part in network) == 2
    q_values = agent.critics(torch.randn(7, 2))
    assert q_values.shape == (2, 7, 3) and (q_values[0] != q_values[1]).all()


# ---- The three losses ----------------------------------------------------------------------------


def test_target_by_hand():
    """Of each action the lesser of both, less the temperature times log pi; the mean over pi."""
    next_q = torch.tensor([[[1.0, 5.0], [7.0, 7.0]], [[3.0, -4.0], [8.0, 9.0]]])
    pi = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    rewards, terminated = torch.tensor([2.0, 3.0]), torch.tensor([False, True])
    found = script.td_target(rewards, terminated, next_q, pi.log(), torch.tensor(0.2), 0.5)
    value = 0.25 * (1 - 0.2 * math.log(0.25)) + 0.75 * (-4 - 0.2 * math.log(0.75))
    torch.testing.assert_close(found, torch.tensor([2 + 0.5 * value, 3.0]))


def test_temperature_moves_the_entropy_to_its_target():
    """The derivative by log alpha is alpha * (entropy - H), whose sign is the right one."""
    for entropy, sign in (0.1, -1), (0.5, 0), (0.9, 1):
        log_alpha = torch.tensor(math.log(0.3), requires_grad=True)
        entropies = torch.tensor([entropy - 0.05, entropy + 0.05])
        script.temperature_loss(log_alpha, entropies, 0.5).backward()
        expected = 0.3 * 0.4 * sign  # alpha falls if it is positive
        assert log_alpha.grad.item() == pytest.approx(expected, abs=1e-6)


def random_batch(size=40):
    obs, next_obs = torch.randn(2, size, 2).double()
    actions, ends = torch.randint(3, (size,)), torch.rand(size) < 0.3
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, ends)


@pytest.mark.parametrize("autotune", [True, False])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_three_gradients_each_of_the_weights_of_its_own(autotune, compile):
    """Separate losses, row by row, all at the old weights.

    The targets differ from the critics. A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    targets = make_agent(seed=1).double().critics
    old_targets = [weights.detach().clone() for weights in targets.parameters()]
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    agent.log_alpha.data.fill_(math.log(0.3))
    settings = {"autotune": autotune, "compile": compile, "target_entropy": 0.6, "alpha": 0.7}
    args = script.Args(gamma=0.9, tau=0.25, **settings)
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = script.update(agent, targets, optimizer, batch, args)

    alpha, losses, entropies, values = 0.3 if autotune else 0.7, [0, 0, 0], [], []
    critics, target_critics = (part.networks for part in (reference.critics, old_critics()))
    for obs, action, reward, next_obs, terminated in zip(*batch):
        y = reward
        if not terminated:
            pi = Categorical(logits=reference.actor(next_obs)).probs.tolist()
            for a in range(3):
                least = min(critic(next_obs)[a].item() for critic in target_critics)
                y = y + 0.9 * pi[a] * (least - alpha * math.log(pi[a]))
        both = [critic(obs) for critic in critics]
        for k in range(2):
            losses[k] += (both[k][action] - y) ** 2 / 2 / 40
            values.append(both[k][action].item())
        policy = Categorical(logits=reference.actor(obs))
        for b in range(3):
            least = min(both[0][b].item(), both[1][b].item())
            losses[2] += policy.probs[b] * (alpha * policy.logits[b] - least) / 40
        entropies.append(policy.entropy().item())

    expected = {}
    for name, loss in zip(("critics.networks.0", "critics.networks.1", "actor"), losses):
        weights = dict(reference.get_submodule(name).named_parameters())
        gradients = torch.autograd.grad(loss, weights.values(), retain_graph=True)
        for part, gradient in zip(weights, gradients):
            expected[f"{name}.{part}"] = weights[part] - 0.1 * gradient
    log_alpha = math.log(0.3)
    if autotune:  # its target is 60% of log 3
        log_alpha -= 0.1 * 0.3 * (np.mean(entropies) - 0.6 * math.log(3))
    assert agent.log_alpha.item() == pytest.approx(log_alpha)
    found = dict(agent.named_parameters())
    assert expected.keys() == found.keys() - {"log_alpha"}
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights)
    for old, found, source in zip(old_targets, targets.parameters(), agent.critics.parameters()):
        torch.testing.assert_close(found, 0.75 * old + 0.25 * source)
    assert {tag: value.item() for tag, value in metrics.items()} == pytest.approx({
        "losses/td_loss": losses[0].item() + losses[1].item(), "losses/q_values": np.mean(values),
        "losses/policy_loss": losses[2].item(), "losses/entropy": np.mean(entropies),
        "losses/alpha": alpha,
    }, rel=1e-5)  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


def old_critics():
    return make_agent(seed=1).double().critics


class Table(nn.Module):
    """A number for each state and action. An observation is a state, one-hot."""

    def __init__(self, *shape):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(*shape).double())

    def forward(self, obs):
        return obs @ self.values


class Tables(nn.Module):
    """An agent of tables."""

    def __init__(self, states, num_actions):
        super().__init__()
        self.actor, self.critics = Table(states, num_actions), Table(2, states, num_actions)
        self.log_alpha = nn.Parameter(torch.tensor(0.0).double())

    def forward(self, obs):
        return self.actor(obs).log_softmax(1)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_updates_find_the_values_of_soft_value_iteration(alpha):
    """V(s) = alpha * log of the sum over a of e^(Q(s, a) / alpha), or the maximum if alpha is 0.

    6 states, 3 actions, rewards and ways at random; about a quarter of the steps terminate.
    """
    random, expected = np.random.default_rng(0), np.zeros((6, 3))
    pairs = [(s, a) for s in range(6) for a in range(3)]
    rewards, following = random.normal(size=(6, 3)), random.integers(6, size=(6, 3))
    terminated = random.random((6, 3)) < 0.25
    for _ in range(300):
        values = expected.max(1)
        if alpha > 0:
            values = values + alpha * np.log(np.exp((expected - values[:, None]) / alpha).sum(1))
        expected = rewards + 0.8 * values[following] * ~terminated
    eye, (s, a) = torch.eye(6).double(), torch.tensor(pairs).T
    columns = (torch.from_numpy(part)[s, a] for part in (rewards, following, terminated))
    rewards, following, terminated = columns
    batch = script.Batch(eye[s], a, rewards, eye[following], terminated)
    agent, targets = Tables(6, 3), Table(2, 6, 3)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-2)
    args = script.Args(gamma=0.8, tau=0.1, autotune=False, alpha=alpha)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 1500)
        script.update(agent, targets, optimizer, batch, args)
    for found in agent.critics.values.detach():
        np.testing.assert_allclose(found, expected, atol=0.05)
    pi = agent(eye).exp().detach()
    if alpha > 0:
        soft = torch.from_numpy(expected / alpha).softmax(1)
        torch.testing.assert_close(pi, soft, rtol=0, atol=0.02)
    else:
        assert pi.argmax(1).tolist() == expected.argmax(1).tolist()


def test_the_learned_temperature_keeps_the_entropy():
    """In one state, pi becomes proportional to e^(reward / alpha), with an entropy of 0.4 log 4."""
    agent, rewards = Tables(1, 4), torch.tensor([1.0, 0.5, 0.0, -2.0]).double()
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-2)
    obs, ends = torch.ones(4, 1).double(), torch.ones(4, dtype=torch.bool)
    batch = script.Batch(obs, torch.arange(4), rewards, obs, ends)
    args = script.Args(autotune=True, target_entropy=0.4)
    for step in range(2000):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 2000)
        metrics = script.update(agent, Table(2, 1, 4), optimizer, batch, args)
    assert metrics["losses/entropy"].item() == pytest.approx(0.4 * math.log(4), abs=0.01)
    expected = (rewards / agent.log_alpha.exp()).softmax(0).detach()
    torch.testing.assert_close(agent(obs[:1])[0].exp().detach(), expected, rtol=0, atol=0.02)


# ---- The loop ------------------------------------------------------------------------------------

FEW = {
    "env_id": "Diary-v0", "total_timesteps": 1200, "num_envs": 3, "learning_starts": 50,
    "batch_size": 16, "buffer_size": 1000, "hidden_size": 16, "train_frequency": 4,
    "eval_episodes": 3, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """Also where an episode ends: its last observation, and terminated only if it was."""
    state, points = train(script, tmp_path, **FEW | {"num_envs": num_envs, "buffer_size": size})
    steps = side_by_side(num_envs)
    assert state["buffer"]["num_added"] == state["envs"]["steps"] == len(steps) == 1200
    ring = [None] * min(size, 1200)
    for number, (_, (obs, action, reward, next_obs, terminated, _)) in enumerate(steps):
        ring[number % size] = obs, action, reward, next_obs, terminated
    for column, expected in zip(state["buffer"]["rows"], zip(*ring), strict=True):
        np.testing.assert_allclose(column, np.array(expected), rtol=1e-6)
    check_episodes(points, steps)


@pytest.mark.parametrize("num_envs, train_frequency, gradient_steps, learning_starts, anneal", [
    (1, 1, 1, 16, True), (1, 7, 3, 50, False), (4, 10, 1, 50, True), (3, 5, 2, 50, True),
    (8, 1, 1, 101, True),
])  # fmt: skip
def test_the_loop_does_each_thing_when_it_is_due(
    tmp_path, monkeypatch, num_envs, train_frequency, gradient_steps, learning_starts, anneal
):
    """In a plain loop over the steps: first a round of them, then what is due after each."""
    notes, networks = [], set()

    def spy(name, note):
        function = getattr(script, name)

        def spying(*arguments, **keywords):
            notes.append((name, note(*arguments, **keywords)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(script, name, spying)

    def note_update(agent, target_critics, optimizer, batch, args):
        networks.add((agent, target_critics))
        assert target_critics is not agent.critics
        return type(optimizer), optimizer.param_groups[0]["lr"], len(batch.obs), args.gamma

    spy("act", lambda actor, obs, noise=0.0: (obs.tolist(), np.shape(noise)))
    spy("update", note_update)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "learning_starts": learning_starts, "total_timesteps": 400, "gamma": 0.8,
        "anneal_lr": anneal,
    })  # fmt: skip
    steps, expected = side_by_side(num_envs), []
    for first in range(0, 400, num_envs):
        if first >= learning_starts:
            seen = [step[0] for _, step in steps[first : first + num_envs]]
            expected.append(("act", (seen, (num_envs, 3))))
        for step in range(first + 1, first + num_envs + 1):
            if step >= learning_starts and step % train_frequency == 0:
                rate = pytest.approx(1e-2 * (1 - first / 400 if anneal else 1))
                expected += [("update", (torch.optim.Adam, rate, 16, 0.8))] * gradient_steps
    assert notes[: len(expected)] == expected
    evaluation = notes[len(expected) :]
    assert evaluation and all(name == "act" and note[1] == () for name, note in evaluation)
    assert len(networks) == 1


def test_before_it_learns_actions_are_uniform_and_each_environment_has_its_own(tmp_path):
    flags = {"learning_starts": 5000, "total_timesteps": 5001, "buffer_size": 5000}
    train(script, tmp_path, **FEW | flags)
    actions = np.array([[step[1] for step in env.steps[:1600]] for env in Diary.made[:3]])
    for row in actions:
        np.testing.assert_allclose(np.bincount(row, minlength=3) / 1600, 1 / 3, atol=0.045)
    assert abs(np.corrcoef(actions) - np.eye(3)).max() < 0.1


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """Each with noise of its own; in the evaluation by the network that is saved."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 600})
    chosen, noises = {}, []
    for (_, obs, *noise), actions in acts:
        chosen |= {tuple(row): action for row, action in zip(obs.tolist(), actions.tolist())}
        noises += [part.ravel() for part in noise]
    for i, env in enumerate(Diary.made):
        steps = env.steps[17 * (i < 3) :]  # 51 random steps of the first three
        assert all(chosen[tuple(obs)] == action for obs, action, *_ in steps)
    noises = np.concatenate(noises)
    assert len(np.unique(noises)) > 0.99 * noises.size and noises.size == 549 * 3
    agent = make_agent()
    agent.load_state_dict(state["network"])
    obs, actions, *_ = zip(*(step for env in Diary.made[3:] for step in env.steps))
    assert script.play(script.Args(), agent, np.float32(obs)).tolist() == list(actions)


def test_at_the_start_the_target_critics_are_the_critics(tmp_path):
    never = {"train_frequency": 1000, "total_timesteps": 100, "seed": 3}
    state, _ = train(script, tmp_path, **FEW | never)
    first = make_agent(seed=3).state_dict()
    for name, weights in state["network"].items():
        assert torch.equal(weights, first[name])
    for name, weights in state["target_critics"].items():
        assert torch.equal(weights, first[f"critics.{name}"])


def test_losses_and_schedules_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002."""
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 3003, "train_frequency": 10})
    steps = (1002, 2001, 3000)  # the first update is at step 50
    expected = {tag: [metrics[step // 10 - 5][tag].item() for step in steps] for tag in metrics[0]}
    expected["charts/learning_rate"] = [1e-2 * (1 - step / 3003) for step in (999, 1998, 2997)]
    for tag, values in expected.items():
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)


@pytest.mark.parametrize("env_id, value", [
    ("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma).

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"autotune": False, "alpha": 0.0, "tau": 0.05, "batch_size": 64, "learning_starts": 64}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1, num_actions=2)
    agent.load_state_dict(state["network"])
    found = agent.critics(torch.ones(1, 1)).detach()
    torch.testing.assert_close(found, torch.full((2, 1, 2), value), rtol=0.15, atol=0)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, alpha=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = FEW | {"total_timesteps": 250, "autotune": "target_entropy" in settings}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "tau": 0.5, "batch_size": 15, "learning_starts": 100,
        "train_frequency": 5, "gradient_steps": 2, "hidden_size": 15, "autotune": True,
        "target_entropy": 0.5, "alpha": 0.5,
    })  # fmt: skip
