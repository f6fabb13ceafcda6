"""The mathematics of rebrac_continuous.py: by hand, by brute force; which steps are learned from.

What td3_continuous.py and iql_continuous.py have word for word, as the noise and data, they test.
"""

import inspect

import iql_continuous
import numpy as np
import pytest
import rebrac_continuous as script
import td3_continuous
import torch
from diary import check_settings, recorded, train

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 600 --num-envs 2 --dataset-size 700 --batch-size 32 --layer-size 32 "
    "--policy-frequency 3 --checkpoint-frequency 150 --eval-frequency 210 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 2000 --dataset-size 3000 --layer-size 32"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--policy-penalty -1", "--policy-penalty"),
    ("--target-penalty nan", "--target-penalty"),
    ("--policy-frequency 0", "--policy-frequency"),
    ("--dataset nowhere", "nowhere"),
]
PLAYS = False  # while it trains: its data are recorded
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 2500 --dataset-size 5000 --layer-size 64", 8),
]  # fmt: skip

OF_TD3 = [
    "Actor", "Bfloat16Linear", "to_bounds", "make_env", "use_bfloat16", "smooth", "td_target",
    "update_target", "Batch", "evaluate", "Envs",
]  # fmt: skip
OF_IQL = ["random_play", "read_dataset", "read_run", "read_arrays"]


@pytest.mark.parametrize(
    "name, other",
    [(name, td3_continuous) for name in OF_TD3] + [(name, iql_continuous) for name in OF_IQL],
)
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, other))
    assert ours == theirs


# ---- The networks --------------------------------------------------------------------------------

LOW, HIGH = np.float32([-2, 0]), np.float32([2, 10])


def make_agent(obs_size=2, layer_size=16, seed=0, layer_norm=True):
    torch.manual_seed(seed)
    return script.Agent(obs_size, LOW, HIGH, layer_size, layer_norm)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_three_hidden_layers_and_those_of_critics_are_normalised(layer_norm):
    """By hand: after ReLU, the mean of the units is 0 and their variance 1, in critics only."""
    agent, obs = make_agent(layer_norm=layer_norm), 30 * torch.randn(9, 2)
    actions = 2 * torch.rand(9, 2) - 1
    for network, inputs, normalised in (
        (agent.actor, obs, False),
        (agent.critics.networks[1], torch.cat([obs, actions], 1), layer_norm),
    ):
        weights = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
        assert [part.out_features for part in weights] == [16, 16, 16, len(weights[3].bias)]
        found = inputs
        for part in weights[:3]:
            found = (found @ part.weight.T + part.bias).clamp(0)
            if normalised:
                variance = found.var(1, correction=0, keepdim=True)
                found = (found - found.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
        found = found @ weights[3].weight.T + weights[3].bias
        torch.testing.assert_close(network(inputs), found)
    values = agent.critics(obs, actions)
    assert values.shape == (2, 9) and not torch.equal(*values)
    np.testing.assert_allclose(script.Actor(agent)(obs.numpy()), agent(obs).detach(), atol=2e-5)


# ---- The losses ----------------------------------------------------------------------------------


def test_distances_are_sums_over_the_numbers_of_an_action():
    actions = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]])
    recorded = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert script.squared_distance(actions, recorded).tolist() == [5.0, 13.0]


def test_policy_loss_by_hand():
    """Smaller Q: 2 and -6, whose mean is -2; of |Q| 4, so lambda is 1/4. Mean distance: 9."""
    q_values, distances = torch.tensor([[2.0, -5.0], [7.0, -6.0]]), torch.tensor([5.0, 13.0])
    for weight, expected in ((0.0, 0.5), (0.1, 1.4), (2.0, 18.5)):
        loss = script.policy_loss(q_values, distances, weight)
        assert loss.shape == () and loss.item() == pytest.approx(expected)


def test_lambda_is_a_constant_for_the_gradient():
    """The smaller Q of each row has the slope -lambda / B, the other none."""
    torch.manual_seed(0)
    q_values = (3 * torch.randn(2, 7).double() - 1).requires_grad_()
    distances = torch.rand(7).double().requires_grad_()
    script.policy_loss(q_values, distances, 0.3).backward()
    smaller = q_values.detach().numpy().min(0)
    expected = np.where(q_values.detach() == smaller, -1 / np.abs(smaller).mean() / 7, 0)
    np.testing.assert_allclose(q_values.grad, expected)
    np.testing.assert_allclose(distances.grad, np.full(7, 0.3 / 7))


def random_batch(size=40):
    obs, next_obs = torch.randn(2, size, 2).double()
    actions, recorded = 2 * torch.rand(2, size, 2).double() - 1
    ends = torch.rand(size) < 0.3
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, ends), recorded


@pytest.mark.parametrize("moves_policy", [True, False])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(moves_policy):
    """Separate losses, at the old weights, row by row. All target networks differ from those they
    follow. Large noise, so that both clips count. A gradient that is left over is no matter.
    """
    agent, reference = make_agent().double(), make_agent().double()
    targets, old_targets = make_agent(seed=1).double(), make_agent(seed=1).double()
    batch, b = random_batch()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    args = script.Args(
        gamma=0.9, tau=0.25, policy_noise=0.9, noise_clip=0.8, policy_penalty=0.3,
        target_penalty=0.7,
    )  # fmt: skip
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, targets, optimizer, batch, b, moves_policy, args)

    torch.manual_seed(5)
    noise = (0.9 * torch.randn(40, 2)).clip(-0.8, 0.8)
    next_actions = (old_targets.actor(batch.next_obs).tanh() + noise).clip(-1, 1)
    next_values = old_targets.critics(batch.next_obs, next_actions)
    target = batch.rewards.clone()
    for row in range(40):
        if not batch.terminated[row]:
            far = sum((next_actions[row, k] - b[row, k]) ** 2 for k in range(2))
            target[row] += 0.9 * (min(next_values[:, row].tolist()) - 0.7 * far.item())
    values = reference.critics(batch.obs, batch.actions)
    losses = [((row - target) ** 2).mean() / 2 for row in values]
    actions = reference.actor(batch.obs).tanh()
    smaller = torch.minimum(*reference.critics(batch.obs, actions))
    scale = float(sum(abs(value) for value in smaller.tolist()) / 40)
    distances = ((actions - batch.actions) ** 2).sum(1)
    losses.append((0.3 * distances - smaller / scale).mean())

    moved = [*reference.critics.networks, reference.actor][: 2 + moves_policy]
    weights = [list(network.parameters()) for network in moved]
    gradients = [torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, weights)]
    for old, gradient in zip(sum(weights, []), sum(gradients, ())):
        old.data -= 0.1 * gradient
    expected, followed = dict(reference.named_parameters()), dict(targets.named_parameters())
    for name, found in agent.named_parameters():
        torch.testing.assert_close(found, expected[name], msg=name)
    for name, old in old_targets.named_parameters():
        share = 0.25 if moves_policy else 0
        torch.testing.assert_close(followed[name], old + share * (expected[name] - old), msg=name)
    logged = {"losses/td_loss": losses[0] + losses[1], "losses/q_values": values.mean()}
    if moves_policy:
        logged["losses/policy_loss"] = losses[2]
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(logged.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not logged


def test_without_penalties_it_is_td3():
    """With TD3's networks: the critics have the same gradient, the policy goes the same way."""
    batch, b = random_batch()
    noise, gradients = torch.randn(40, 2).double(), []
    for module in (script, td3_continuous):
        args = module.Args(**{"policy_penalty": 0, "target_penalty": 0} if module is script else {})
        agents = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            agent = td3_continuous.Agent(2, LOW, HIGH, 16).double()
            first, second = agent.critics.networks
            second.load_state_dict(first.state_dict())  # else the smaller one is not always TD3's
            agents.append(agent)
        rest = (b, noise) if module is script else (noise,)
        module.compute_gradient(*agents, batch, *rest, True, args)
        gradients.append([weights.grad for weights in agents[0].parameters()])
    scale = agents[0].critics(batch.obs, agents[0](batch.obs))[0].abs().mean()
    of_actor = len(list(agents[0].actor.parameters()))
    for i, (ours, theirs) in enumerate(zip(*gradients)):
        torch.testing.assert_close(ours * (scale if i < of_actor else 1), theirs)


# ---- pair ----------------------------------------------------------------------------------------


def walk(num_envs, count, seed=0, places=10**6):
    """Steps of environments side by side: (s, a, s', terminated, row of s' or None).

    An episode ends with the probability 0.2, then it starts elsewhere; at every other end, a time
    limit has truncated it. With few places, states come again.
    """
    rng = np.random.default_rng(seed)
    place, rows = [int(rng.integers(places)) for _ in range(num_envs)], []
    for _ in range(count):
        for i in range(num_envs):
            end = rng.random() < 0.2
            following = int(rng.integers(places))
            rows.append((place[i], rng.random(), following, end and rng.random() < 0.5))
            place[i] = int(rng.integers(places)) if end else following
    return rows


def as_batch(rows):
    obs, actions, next_obs, terminated = zip(*rows)
    columns = (torch.tensor(x).float() for x in (obs, next_obs))
    obs, next_obs = (torch.stack([column / 7, column], 1) for column in columns)
    actions = torch.tensor(actions).float()[:, None]
    return script.Batch(
        obs, actions, torch.arange(len(rows)).float(), next_obs, torch.tensor(terminated)
    )


@pytest.mark.parametrize("num_envs, count, places", [
    (1, 300, 10**6), (4, 100, 10**6), (3, 100, 12), (2, 3, 1),
])  # fmt: skip
def test_the_recorded_next_action_by_brute_force(num_envs, count, places):
    """The first later row that starts where this one ended, if any."""
    rows = walk(num_envs, count, places=places)
    data, recorded = script.pair(as_batch(rows))
    expected = []
    for i, (_, _, following, terminated) in enumerate(rows):
        later = [action for place, action, *_ in rows[i + 1 :] if place == following]
        if later or terminated:
            expected.append((i, later[0] if later else 0.0))
    assert data.rewards.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(recorded, torch.tensor([[a] for _, a in expected]).reshape(-1, 1))
    for ours, column in zip(data, as_batch(rows)):
        assert torch.equal(ours, column[[i for i, _ in expected]])
    if places == 10**6:
        assert 0.75 < len(expected) / len(rows) < 1  # of each ten rows, one is cut


def test_the_last_numbers_of_observations_count_too():
    """Two states that share a number are not the same."""
    obs, next_obs = torch.tensor([[[1.0, 2], [1, 3], [1, 4]], [[1, 4], [1, 5], [1, 2]]])
    actions, no = torch.tensor([[0.1], [0.2], [0.3]]), torch.zeros(3, dtype=torch.bool)
    data, recorded = script.pair(script.Batch(obs, actions, torch.arange(3.0), next_obs, no))
    assert data.rewards.tolist() == [0] and recorded.tolist() == [[actions[2].item()]]


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, dataset_size=400, batch_size=16,
    layer_size=16, eval_episodes=3,
)  # fmt: skip


def write_data(path, count=50, seed=0):
    """One long episode whose steps are in order, with two that terminate and one that is cut."""
    rng = np.random.default_rng(seed)
    obs = rng.normal([5, -40], [0.5, 9], (count + 1, 2)).astype(np.float32)
    next_obs = obs[1:].copy()
    next_obs[[10, 20, 30]] += 100
    terminated = np.zeros(count, bool)
    terminated[[10, 20]] = True
    arrays = {
        "observations": obs[:-1], "next_observations": next_obs,
        "actions": rng.uniform(LOW, HIGH, (count, 2)), "rewards": np.arange(count),
        "terminals": terminated,
    }  # fmt: skip
    np.savez(path, **arrays)
    return arrays


def test_every_step_is_a_gradient_step_on_rows_of_the_data(tmp_path, monkeypatch):
    """With the action of the next row, between -1 and 1; 30 is cut, and the last has none."""
    arrays = write_data(tmp_path / "data.npz")
    actions = np.float32(2 * (arrays["actions"] - LOW) / (HIGH - LOW) - 1)
    updates = recorded(monkeypatch, script, "update")
    settings = {"dataset": str(tmp_path / "data.npz"), "policy_frequency": 3, "gamma": 0.8}
    state, _ = train(script, tmp_path, **FEW | settings)
    assert len(updates) == 300 == state["envs"]["steps"]
    drawn = set()
    for step, ((agent, target_agent, optimizer, batch, b, moves_policy, args), _) in enumerate(
        updates, 1
    ):
        assert moves_policy == (step % 3 == 0) and args.gamma == 0.8
        assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 1e-3
        rows = batch.rewards.int().tolist()
        assert len(rows) == 16 and len(set(rows)) > 7  # each is drawn by itself
        np.testing.assert_array_equal(batch.obs, arrays["observations"][rows])
        np.testing.assert_array_equal(batch.next_obs, arrays["next_observations"][rows])
        np.testing.assert_array_equal(batch.terminated, arrays["terminals"][rows])
        np.testing.assert_allclose(batch.actions, actions[rows], atol=1e-6)
        for row, action in zip(rows, b):
            expected = 0 * actions[0] if row in (10, 20) else actions[row + 1]
            np.testing.assert_allclose(action, expected, atol=1e-6)
        drawn |= set(rows)
    assert drawn == set(range(49)) - {30}
    pointers = {weights.data_ptr() for weights in agent.parameters()}
    assert pointers.isdisjoint(weights.data_ptr() for weights in target_agent.parameters())


def test_at_the_start_the_target_networks_are_the_trained_ones(tmp_path):
    never = {"policy_frequency": 1000, "seed": 3, "total_timesteps": 20}
    state, _ = train(script, tmp_path, **FEW | never)
    for name, weights in make_agent(seed=3).state_dict().items():
        assert torch.equal(weights, state["target_agent"][name])
        if name.startswith("actor"):  # which never moved
            assert torch.equal(weights, state["network"][name])


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Of the policy's loss, the newest: it moves at 7, 14, ... 100 stands for 1000 here."""
    assert script.LOG_FREQUENCY == 1000
    monkeypatch.setattr(script, "LOG_FREQUENCY", 100)
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 201, "policy_frequency": 7})
    for tag in ("losses/td_loss", "losses/q_values", "losses/policy_loss"):
        period = 7 if tag == "losses/policy_loss" else 1
        values = [metrics[step // period * period - 1][tag].item() for step in (100, 200)]
        np.testing.assert_allclose(points[tag], list(zip((100, 200), values)), rtol=1e-5)


def test_data_in_which_nothing_follows_are_refused(tmp_path):
    arrays = write_data(tmp_path / "data.npz")
    arrays |= {"next_observations": 0 * arrays["observations"], "terminals": np.zeros(50, bool)}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(script.UsageError, match="no step follows"):
        train(script, tmp_path / "runs", **FEW | {"dataset": str(tmp_path / "data.npz")})
    assert not (tmp_path / "runs").exists()


def test_a_penalty_that_cannot_be_avoided_is_worth_what_it_costs(tmp_path):
    """No reward is paid, and all recorded actions are 0: the policy learns to be there.

    Only the noise takes a' away from them, by 2 * 0.2^2 on average (hardly any of it is clipped).
    So Q is -gamma * beta_2 * 0.08 / (1 - gamma).
    """
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(401, 2)).astype(np.float32)
    np.savez(
        tmp_path / "data.npz", observations=obs[:-1], next_observations=obs[1:],
        actions=(LOW + HIGH) / 2 + np.zeros((400, 2)), rewards=np.zeros(400),
        terminals=np.zeros(400, bool),
    )  # fmt: skip
    found = []
    for weight in (0.0, 1.0):
        settings = {
            "dataset": str(tmp_path / "data.npz"), "target_penalty": weight, "gamma": 0.5,
            "policy_penalty": 10.0, "total_timesteps": 500, "tau": 0.1, "policy_noise": 0.2,
                "learning_rate": 3e-3,
        }  # fmt: skip
        state, _ = train(script, tmp_path, **FEW | settings)
        agent = make_agent()
        agent.load_state_dict(state["network"])
        found.append(agent.critics(torch.tensor(obs), torch.zeros(401, 2)).mean().item())
    assert found[0] == pytest.approx(0, abs=0.02)
    assert found[1] == pytest.approx(-0.5 * 0.08 / (1 - 0.5), rel=0.2)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    write_data(tmp_path / "data.npz")

    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 20} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 24, "num_envs": 4, "dataset": str(tmp_path / "data.npz"),
        "dataset_size": 500, "learning_rate": 5e-4, "gamma": 0.9, "policy_penalty": 1.0,
        "target_penalty": 1.0, "tau": 0.5, "batch_size": 15, "layer_size": 15, "layer_norm": False,
        "policy_noise": 0.3, "noise_clip": 0.1, "policy_frequency": 1,
    })  # fmt: skip
