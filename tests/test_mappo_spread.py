"""The mathematics of mappo_spread.py: the game, what actor and critic see, the loss of a team.

What ppo_cartpole.py and qmix_twostep.py have word for word is tested there.
"""

import ast
import inspect
import json
import math
import textwrap

import gymnasium as gym
import mappo_spread as script
import numpy as np
import ppo_cartpole
import pytest
import qmix_twostep
import torch
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_statistics, check_settings, recorded,
    side_by_side, train,
)  # fmt: skip
from gymnasium.spaces import Box, MultiDiscrete
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-minibatches 2 --update-epochs 2 --norm-obs "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "teams"
OWN_FLAGS = "--total-timesteps 10000 --num-envs 8 --gamma 0.5"
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--critic none", "--critic"),
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--gae-lambda 1.01", "--gae-lambda"),
    ("--env-kwargs '{\"num_agents\": 0}'", "num_agents"),
    ("--env-kwargs '{\"num_agents\": 2.5}'", "num_agents"),
    ("--env-kwargs '{\"num_agents\": true}'", "num_agents"),
    ('--env-kwargs \'{"num_agents": "many"}\'', "num_agents"),
]
LEARNS = [("--total-timesteps 100000", -190)]  # random actions: -231


def code(module, name):
    """The code of a function or class, without docstrings and comments."""
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    tree = ast.parse(textwrap.dedent(inspect.getsource(found)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("name", [
    "Agent.normalize", "Batch", "RunningStatistics", "act", "clipped_policy_loss", "evaluate",
    "explained_variance", "gae", "gumbel_noise", "layer", "learn", "log_prob_and_entropy", "play",
    "update",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    assert code(script, name) == code(ppo_cartpole, name)


def test_what_spaces_fit_is_tested_with_qmix():
    assert code(script, "make_env") == code(qmix_twostep, "make_env")


# ---- Spread --------------------------------------------------------------------------------------


class SlowSpread:
    """The game from its definition, in loops over pairs of bodies (OpenAI's multiagent/core.py,
    scenarios/simple_spread.py, environment.py): forces, velocities, places, then rewards.
    """

    def __init__(self, places, velocities, landmarks):
        self.places, self.velocities, self.landmarks = places, velocities, landmarks

    def step(self, actions):
        forces = []
        for i, action in enumerate(actions):
            x, y = [(0, 0), (5, 0), (-5, 0), (0, 5), (0, -5)][action]
            for j, other in enumerate(self.places):
                if i != j:
                    dx, dy = self.places[i][0] - other[0], self.places[i][1] - other[1]
                    distance = math.sqrt(dx * dx + dy * dy)
                    depth = (0.15 + 0.15 - distance) / 0.001  # softly: log(1 + e^depth)
                    soft = depth if depth > 50 else math.log(1 + math.exp(depth))
                    x += 100 * dx / distance * soft * 0.001
                    y += 100 * dy / distance * soft * 0.001
            forces.append((x, y))
        for i, (x, y) in enumerate(forces):
            u, v = self.velocities[i]
            self.velocities[i] = (u * (1 - 0.25) + x * 0.1, v * (1 - 0.25) + y * 0.1)
        for i, (u, v) in enumerate(self.velocities):
            self.places[i] = (self.places[i][0] + u * 0.1, self.places[i][1] + v * 0.1)
        return sum(self.reward(i) for i in range(len(self.places)))

    def reward(self, agent):
        total = 0.0
        for landmark in self.landmarks:
            total -= min(math.dist(place, landmark) for place in self.places)
        for place in self.places:  # also itself
            if math.dist(self.places[agent], place) < 0.15 + 0.15:
                total -= 1
        return total

    def obs(self):
        rows = []
        for i, (x, y) in enumerate(self.places):
            row = [*self.velocities[i], x, y]
            for other in self.landmarks + self.places[:i] + self.places[i + 1 :]:
                row += [other[0] - x, other[1] - y]
            rows.append(row)
        return rows


def pairs(points):
    return [(point.real, point.imag) for point in points.tolist()]


@pytest.mark.parametrize("num_agents", [1, 3, 5])
def test_200_random_steps_are_those_of_the_definition(num_agents):
    """Eight episodes. With five agents, many touch."""
    env, touches = script.Spread(num_agents), 0
    generator = np.random.default_rng(0)
    for episode in range(8):
        obs, _ = env.reset(seed=episode)
        slow = SlowSpread(
            pairs(env.places[num_agents:]), [(0.0, 0.0)] * num_agents,
            pairs(env.places[:num_agents]),
        )  # fmt: skip
        np.testing.assert_allclose(obs, slow.obs(), atol=1e-6)
        for _ in range(25):
            actions = generator.integers(5, size=num_agents)
            obs, reward, terminated, truncated, _ = env.step(actions)
            expected = slow.step(actions.tolist())
            assert type(reward) is float and reward == pytest.approx(expected, abs=1e-6)
            assert obs.dtype == np.float32 and env.observation_space.contains(obs)
            np.testing.assert_allclose(obs, slow.obs(), atol=1e-5)
            assert not terminated and not truncated
            distances = [math.dist(p, q) for p in slow.places for q in slow.places]
            touches += sum(0 < distance < 0.3 for distance in distances) // 2
    assert touches > 10 or num_agents < 5


def placed(agents, landmarks):
    env = script.Spread(len(agents))
    env.reset(seed=0)
    env.places = np.array([*landmarks, *agents], complex)
    env.observe()
    return env


def test_two_agents_that_overlap_are_pushed_apart_by_hand():
    """0.1 too near: a force of 100 * 0.1 on each, opposite; in 0.1 s a velocity of 1."""
    env = placed([0, 0.2j], [0, 1j])
    obs, reward, *_ = env.step(np.array([0, 1]))  # the second one pushes to the right, too
    np.testing.assert_allclose(obs[:, :4], [[0, -1, 0, -0.1], [0.5, 1, 0.05, 0.3]], atol=1e-6)
    np.testing.assert_allclose(obs[0, 4:], [0, 0.1, 0, 1.1, 0.05, 0.4], atol=1e-6)
    assert reward == pytest.approx(-2 * (0.1 + math.hypot(0.05, 0.7)) - 2)
    obs, *_ = env.step(np.array([0, 0]))  # they no longer touch, and lose a quarter
    np.testing.assert_allclose(obs[:, :2], [[0, -0.75], [0.375, 0.75]], atol=1e-6)


def test_nothing_is_better_than_an_agent_at_each_landmark():
    """Each still pays for touching itself. Two at one landmark pay more, for each other."""
    corners = [1, -1, 1j]
    assert placed(corners, corners).step(np.zeros(3, int))[1] == pytest.approx(-3)
    env = placed([1, 1.25, -1], [1, 1, -1])
    env.STIFFNESS = 0
    assert env.step(np.zeros(3, int))[1] == pytest.approx(-3 - 2)


def test_episodes_are_truncated_after_25_steps_and_begin_anywhere_at_rest():
    env, starts = gym.make("Spread-v0"), []
    for seed in range(200):
        obs, _ = env.reset(seed=seed)
        starts.append(env.unwrapped.places)
        assert not obs[:, :2].any()
    numbers = np.array(starts).view(float)
    assert numbers.shape == (200, 12) and np.abs(numbers).max() < 1
    assert np.abs(numbers.mean(0)).max() < 0.15 and np.abs(numbers.std(0) - 3**-0.5).max() < 0.1
    assert abs(np.corrcoef(numbers.T) - np.eye(12)).max() < 0.3
    for t in range(1, 26):
        _, _, terminated, truncated, _ = env.step(np.zeros(3, int))
        assert not terminated and truncated == (t == 25)
    assert np.array_equal(env.reset(seed=7)[0], gym.make("Spread-v0").reset(seed=7)[0])
    assert (env.reset(seed=7)[0] != env.reset(seed=8)[0]).any()


def test_the_game_is_drawn():
    """Three discs of the agents, with dots of landmarks in front; up is up."""
    picture = placed([-1, 1, 1j], [-1, 0, -1j]).render()
    assert picture.shape == (240, 240, 3) and picture.dtype == np.uint8
    blue, grey = (picture == (90, 90, 220)).all(2), (picture == (60, 60, 60)).all(2)
    assert (picture[~blue & ~grey] == 255).all()
    pixel = (3 / 239) ** 2
    assert grey.sum() * pixel == pytest.approx(3 * math.pi * 0.05**2, rel=0.1)
    expected = math.pi * (3 * 0.15**2 - 0.05**2)
    assert blue.sum() * pixel == pytest.approx(expected, rel=0.03)
    assert blue[40, 120] and blue[120, 199] and grey[120, 40] and grey[199, 120]


# ---- What actor and critic see -------------------------------------------------------------------

CRITICS = pytest.mark.parametrize("critic", ["central", "local"])


def make_agent(num_agents=3, obs_size=6, num_actions=4, **flags):
    torch.manual_seed(0)
    return script.Agent(num_agents, obs_size, num_actions, script.Args(**flags))


@CRITICS
def test_an_agent_sees_its_own_row_and_its_number(critic):
    """And so does the local critic. The central one sees all, and has one value for the team."""
    agent, obs = make_agent(critic=critic), torch.randn(2, 5, 6)
    logits, values = agent(obs)
    obs[..., 2:4] += 1  # what the second agent sees
    changed = [(now != before) for now, before in zip(agent(obs), (logits, values))]
    assert logits.shape == (2, 5, 3, 4)
    assert changed[0].all(-1).all(0).all(0).tolist() == [False, True, False]
    assert changed[0].any(-1).any(0).any(0).tolist() == [False, True, False]
    expected = {"central": [True], "local": [False, True, False]}[critic]
    assert values.shape == (2, 5, len(expected))
    assert changed[1].all(0).all(0).tolist() == changed[1].any(0).any(0).tolist() == expected
    logits, values = (numbers[0] for numbers in agent(torch.ones(1, 6)))  # all see the same
    for row in [logits] + [values[:, None]] * (critic == "local"):
        assert not any(torch.equal(row[i], row[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_actor_is_the_agents_also_after_an_update(norm_obs):
    """And the evaluation is greedy."""
    agent = make_agent(norm_obs=norm_obs)
    obs = 3 * torch.randn(50, 6) + torch.arange(6)
    if norm_obs:
        agent.obs_statistics.update(obs.reshape(-1, 2))
    actor = script.Actor(agent)
    for _ in range(2):
        logits = agent(obs)[0].detach()
        np.testing.assert_allclose(actor(obs.numpy()), logits, rtol=1e-4, atol=1e-6)
        found = script.play(script.Args(), agent, obs.numpy())
        assert found.tolist() == logits.argmax(2).tolist() and len(set(found.flatten())) > 1
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_agents_choose_independently_of_each_other():
    torch.manual_seed(0)
    logits = np.tile(np.log(np.float32([[0.2, 0.8], [0.5, 0.5]])), (20_000, 1, 1))
    actions = script.act(lambda obs: logits, None, script.gumbel_noise(20_000, 2, 2))
    assert actions.shape == (20_000, 2)
    assert (actions == [1, 0]).mean(0) == pytest.approx([0.8, 0.5], abs=0.015)
    assert (actions == [1, 0]).all(1).mean() == pytest.approx(0.4, abs=0.015)


@CRITICS
def test_the_first_policy_is_nearly_uniform(critic):
    agent = make_agent(critic=critic)
    assert (agent(torch.randn(7, 6))[0].softmax(-1) - 1 / 4).abs().max() < 0.01
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linears = [module for module in network if isinstance(module, nn.Linear)]
        for linear, gain in zip(linears, (math.sqrt(2), math.sqrt(2), last), strict=True):
            rows = min((linear.weight, linear.weight.T), key=len)
            expected = gain**2 * torch.eye(len(rows))
            torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)


@CRITICS
def test_values_are_in_units_of_the_targets(critic):
    """The critic tells how many deviations V is above the mean of the targets so far."""
    agent, obs = make_agent(critic=critic), torch.randn(5, 6)
    logits, plain = agent(obs)
    agent.target_statistics.update(torch.tensor([[-30.0], [-10.0], [-20.0], [-20.0]]))
    again, values = agent(obs)
    assert torch.equal(logits, again)
    torch.testing.assert_close(values, -20 + math.sqrt(50) * plain)
    torch.testing.assert_close(agent.deviation(), torch.tensor([math.sqrt(50)]))


def test_observations_are_normalised_before_both_networks():
    agent, plain = make_agent(norm_obs=True), make_agent()
    agent.obs_statistics.update(torch.tensor([[1.0, 10], [3.0, 30]]))  # 2 ± 1 and 20 ± 10
    obs = torch.tensor([[3.0, 40, 2, 20, 1e6, -1e6]])
    expected = plain(torch.tensor([[1.0, 2, 0, 0, 10, -10]]))
    for found, theirs in zip(agent(obs), expected):
        torch.testing.assert_close(found, theirs)


# ---- The loss of a team --------------------------------------------------------------------------


class Table(nn.Module):
    """For each state, logits of two agents and V: one, or one for each. Observations are one-hot."""

    def __init__(self, logits, values, deviation=1.0):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits.flatten(1), values], 1))
        self.shape, self.scale = logits.shape[1:], torch.tensor([deviation]).double()

    def forward(self, obs):
        numbers, size = obs @ self.numbers, math.prod(self.shape)
        return numbers[..., :size].unflatten(-1, self.shape), numbers[..., size:]

    def deviation(self):
        return self.scale


def example(num_values):
    """A table of 3 states, 2 agents and 4 actions; 9 steps by a policy that was different."""
    torch.manual_seed(0)
    table = Table(torch.randn(3, 2, 4).double(), torch.randn(3, num_values).double(), 2.5)
    states, actions = torch.arange(9) % 3, torch.randint(4, (9, 2))
    logits = table(torch.eye(3).double())[0].detach()
    now = Categorical(logits=logits[states]).log_prob(actions)
    log_probs = now + 0.3 * torch.randn(9, 2).double()
    targets = torch.randn(2, 9, num_values).double()
    return table, states, script.Batch(torch.eye(3).double()[states], actions, log_probs, *targets)


def losses_in_loops(table, states, batch, args):
    """The metrics, and the whole loss, once more from the equations: step by step, agent by agent.

    Where there is one V, its advantage is that of each agent.
    """
    numbers, num_values = table.numbers.detach().numpy(), batch.returns.shape[1]
    advantages, rows, errors = batch.advantages.numpy(), [], []
    if args.norm_adv:
        advantages = (advantages - np.mean(advantages)) / np.std(advantages, ddof=1)
    for b, state in enumerate(states.tolist()):
        for i in range(2):
            logits = numbers[state, 4 * i : 4 * i + 4]
            pi = np.exp(logits) / np.exp(logits).sum()
            advantage = advantages[b, i if num_values == 2 else 0]
            ratio = pi[batch.actions[b, i]] / math.exp(batch.log_probs[b, i])
            bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
            rows.append({
                "losses/policy_loss": -min(ratio * advantage, bounded * advantage),
                "losses/value_loss": 0.0,
                "losses/entropy": -(pi * np.log(pi)).sum(),
                "losses/approx_kl": ratio - 1 - math.log(ratio),
                "losses/clipfrac": float(ratio != bounded),
            })  # fmt: skip
        for v in range(num_values):
            errors.append((numbers[state, 8 + v] - batch.returns[b, v].item()) / 2.5)
    means = {tag: np.mean([row[tag] for row in rows]) for tag in rows[0]}
    means["losses/value_loss"] = np.mean(np.square(errors)) / 2
    policy_loss, value_loss, entropy, *_ = means.values()
    return means, policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy


@pytest.mark.parametrize("num_values", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"norm_adv": False, "ent_coef": 0.5, "vf_coef": 2.0}])
def test_update_goes_down_the_gradient_of_the_loss(flags, num_values):
    args = script.Args(**{"max_grad_norm": 1e9} | flags)
    table, states, batch = example(num_values)
    before, h = table.numbers.detach().clone(), 1e-6
    gradient = torch.zeros_like(before)
    for place in np.ndindex(*before.shape):
        losses = []
        for change in (h, -h):
            table.numbers.data.copy_(before)[place] += change
            losses.append(losses_in_loops(table, states, batch, args)[1])
        gradient[place] = (losses[0] - losses[1]) / (2 * h)
    table.numbers.data.copy_(before)
    expected, _ = losses_in_loops(table, states, batch, args)
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    np.testing.assert_allclose(table.numbers.detach(), before - 0.1 * gradient, atol=1e-7)
    assert 0 < expected["losses/clipfrac"] < 1
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("num_values", [1, 2])
def test_the_ratio_of_one_agent_does_not_move_the_loss_of_another(num_values):
    """A ratio of the joint action, their product, would: it would be clipped for both."""
    gradients = []
    for change in (0.0, -2.0, 2.0):
        table, _, batch = example(num_values)
        batch.log_probs[:, 0] += change  # the ratio of the first agent times e^-change
        script.compute_gradient(table, batch, script.Args(max_grad_norm=0))
        gradients.append(table.numbers.grad.clone())
    for other in gradients[1:]:
        assert torch.equal(gradients[0][:, 4:], other[:, 4:])
        assert not torch.equal(gradients[0][:, :4], other[:, :4])


def test_the_gradient_is_clipped_to_its_norm():
    table, _, batch = example(1)
    gradients = []
    for limit in (0, 1e-3):
        table.zero_grad()
        script.compute_gradient(table, batch, script.Args(max_grad_norm=limit))
        gradients.append(table.numbers.grad.clone())
    assert gradients[0].norm() > 1e-2
    expected = 1e-3 * gradients[0] / gradients[0].norm()
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=0)


@CRITICS
@pytest.mark.parametrize("norm_value", [True, False])
def test_a_batch_is_every_step_with_the_advantages_of_the_team(critic, norm_value):
    """In T * N rows, those of a step side by side. One reward, and ends, for all values."""
    agent = make_agent(critic=critic)
    if norm_value:
        agent.target_statistics.update(torch.tensor([[-30.0], [-10.0]]))
    obs, next_obs = torch.randn(2, 4, 2, 6)
    actions, rewards = torch.randint(4, (4, 2, 3)), torch.randn(4, 2)
    terminated, truncated = torch.zeros(2, 4, 2, dtype=torch.bool)
    terminated[1, 0], truncated[2, 1] = True, True
    args = script.Args(critic=critic, gamma=0.7, gae_lambda=0.6)
    rollout = obs, actions, rewards, next_obs, terminated, truncated
    batch = script.make_batch(agent, *rollout, args)
    values, next_values = (agent(x)[1].detach().numpy() for x in (obs, next_obs))
    log_probs = Categorical(logits=agent(obs)[0].detach()).log_prob(actions)
    for t, n in np.ndindex(4, 2):
        row = 2 * t + n
        assert torch.equal(batch.obs[row], obs[t, n])
        assert torch.equal(batch.actions[row], actions[t, n])
        torch.testing.assert_close(batch.log_probs[row], log_probs[t, n])
        for v in range(values.shape[2]):
            advantage, weight = 0.0, 1.0
            for k in range(t, 4):  # equation 16: a sum of later TD errors
                following = 0 if terminated[k, n] else 0.7 * next_values[k, n, v]
                delta = rewards[k, n].item() + following - values[k, n, v]
                advantage, weight = advantage + weight * delta, weight * 0.7 * 0.6
                if terminated[k, n] or truncated[k, n]:
                    break
            assert batch.advantages[row, v].item() == pytest.approx(advantage, rel=1e-4, abs=1e-4)
            target = advantage + values[t, n, v]
            assert batch.returns[row, v].item() == pytest.approx(target, rel=1e-4, abs=1e-4)
    assert batch.returns.shape == (8, 1 if critic == "central" else 3)
    assert not any(part.requires_grad for part in batch)


def test_only_the_state_tells_what_agents_are_worth_together():
    """Targets are 1 where two agents see the same, else -1. Each by itself cannot know."""
    errors = {}
    for critic in ("central", "local"):
        args = script.Args(critic=critic)
        agent = make_agent(2, 2, 2, critic=critic)
        obs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        returns = (obs[:, :1] * obs[:, 1:]).expand(-1, agent(obs)[1].shape[1])
        zeros = torch.zeros(4, 2)
        batch = script.Batch(obs, zeros.long(), zeros, torch.zeros_like(returns), returns)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        for _ in range(150):
            metrics = script.update(agent, optimizer, batch, args)
        errors[critic] = metrics["losses/value_loss"].item()
    assert errors["central"] < 0.01 and errors["local"] == pytest.approx(0.5, abs=0.02)


# ---- The loop ------------------------------------------------------------------------------------


class TeamDiary(Diary):
    """Two agents see a number each."""

    observation_space = Box(-np.inf, np.inf, (2, 1), np.float64)
    action_space = MultiDiscrete([3, 3])

    def reset(self, **options):
        return super().reset(**options)[0][:, None], {}

    def step(self, action):
        obs, *rest = super().step(action)
        return obs[:, None], *rest


class TeamPays(gym.Env):
    """One state, two agents; every step pays 1. Episodes of three steps."""

    observation_space, action_space = Box(-1, 1, (2, 1), np.float32), MultiDiscrete([2, 2])

    def __init__(self, truncates, render_mode=None):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.ones((2, 1), np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 3
        return np.ones((2, 1), np.float32), 1.0, end and not self.truncates, end, {}


gym.register("TwoDiary-v0", entry_point=TeamDiary)
gym.register("TeamPays-v0", entry_point=TeamPays)
FEW = dict(
    env_id="TwoDiary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False,
)  # fmt: skip


@CRITICS
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, critic):
    """Also where an episode ends: its last observation, not the next one's first."""
    calls = recorded(monkeypatch, script, "make_batch")
    state, points = train(script, tmp_path, **FEW, critic=critic)
    steps = side_by_side(3)
    assert len(calls) == 10 and len(steps) == state["envs"]["steps"] == 600
    for number, ((_, *rollout, _), _) in enumerate(calls):
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    actions = calls[0][0][2]
    assert actions.shape == (20, 3, 2) and set(actions.flatten().tolist()) == {0, 1, 2}
    assert (actions[..., 0] == actions[..., 1]).float().mean() < 0.6  # a third, by chance
    check_episodes(points, steps)


def test_every_agent_gets_the_action_for_what_it_sees(tmp_path, monkeypatch):
    def choose(obs):
        return (obs * 1000).astype(int) % 3

    monkeypatch.setattr(script, "act", lambda actor, obs, noise=0.0: choose(obs))
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist()


@CRITICS
@pytest.mark.parametrize("norm_value", [True, False])
def test_targets_are_normalised_by_all_so_far(tmp_path, monkeypatch, critic, norm_value):
    """Those of this rollout among them, once each, before the epochs; the batch is not changed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    state, _ = train(script, tmp_path, **FEW, critic=critic, norm_value=norm_value)
    targets = []
    for ((agent, _, batch, _), _), (_, before) in zip(learned, rollouts, strict=True):
        assert torch.equal(batch.returns, before.returns)
        targets += batch.returns.flatten().tolist()
        expected = (np.mean(targets), np.var(targets)) if norm_value else (0, 1)
        found = agent.target_statistics.mean.item(), agent.target_statistics.variance.item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len(targets) == 600 * (1 if critic == "central" else 2)
    saved = state["network"]["target_statistics.count"].item()
    assert saved == (len(targets) if norm_value else 0)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW, anneal_lr=anneal_lr)


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, agents=2, **FEW, norm_obs=True)


@pytest.mark.parametrize("critic, truncates, low, high", [
    ("central", True, 4.9, 5.1), ("local", False, 1.7, 1.9)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, critic, truncates, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    flags = {"env_id": "TeamPays-v0", "gamma": 0.8, "gae_lambda": 0.9, "total_timesteps": 1800}
    flags |= {"env_kwargs": json.dumps({"truncates": truncates}), "critic": critic}
    flags |= {"update_epochs": 20, "num_minibatches": 1, "vf_coef": 1.0, "max_grad_norm": 10.0}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = script.Agent(2, 2, 2, state["args"])
    agent.load_state_dict(state["network"])
    values = agent(torch.ones(1, 2))[1]
    assert ((low < values) & (values < high)).all()


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "critic": "local", "num_minibatches": 3,
        "update_epochs": 3, "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1,
        "max_grad_norm": 0.01, "norm_obs": True, "norm_value": False,
    })  # fmt: skip
