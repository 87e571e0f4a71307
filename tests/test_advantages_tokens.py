"""Credit of tokens: by hand, and against plain loops over each response's own tokens."""

import math
import random

import pytest
import torch

from megarl.advantages import (
    distillation,
    gae,
    moments,
    pad,
    prime,
    reinforce_pp,
    reinforce_pp_baseline,
    reward_to_go,
    token_rewards,
    whiten,
)

NAN = math.nan


def float64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(*rows):
    """110 is two tokens of the policy and one of something else."""
    return torch.tensor([[c == "1" for c in row] for row in rows])


def random_case(seed):
    """Five responses of up to seven tokens with holes, one of them without any token, NaN wherever it is masked."""
    rng = random.Random(seed)
    rows = [[rng.random() < 0.6 for _ in range(7)] for _ in range(5)]
    rows[3] = [False] * 7
    mask = torch.tensor(rows)
    rewards, values = (torch.tensor([[rng.gauss(0, 1) for _ in range(7)] for _ in range(5)]).double() for _ in range(2))
    return mask, rewards.where(mask, NAN), values.where(mask, NAN)


def own_tokens(x, mask):
    """Each response's tokens without holes, as plain lists."""
    return [
        [v for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(x.tolist(), mask.tolist(), strict=True)
    ]


# ---- rewards of tokens ----


def test_the_score_is_at_the_last_token_that_the_policy_wrote():
    mask = mask_of("1101", "1100", "0000")
    got = token_rewards(float64([5, 6, 7]), mask)
    assert got.tolist() == [[0, 0, 0, 5], [0, 6, 0, 0], [0, 0, 0, 0]]


def test_kl_is_taken_off_token_by_token():
    mask = mask_of("1011", "1000")
    kl = float64([[1, NAN, 2, 3], [4, NAN, NAN, NAN]])
    got = token_rewards(float64([10, 20]), mask, kl, kl_coef=0.5)
    assert got.tolist() == [[-0.5, 0, -1, 10 - 1.5], [20 - 2, 0, 0, 0]]


# ---- returns and GAE ----


def test_reward_to_go_by_hand():
    """gamma 1/2: 4, then 2 + 4/2, then 1 + 4/2; the hole between takes no step of discount."""
    got = reward_to_go(float64([[1, NAN, 2, 4]]), mask_of("1011"), gamma=0.5)
    assert got.tolist() == [[3, 0, 4, 4]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reward_to_go_against_a_loop(seed, gamma):
    mask, rewards, _ = random_case(seed)
    got = reward_to_go(rewards, mask, gamma)
    for ours, own in zip(own_tokens(got, mask), own_tokens(rewards, mask), strict=True):
        expected = [sum(gamma ** (s - t) * own[s] for s in range(t, len(own))) for t in range(len(own))]
        assert ours == pytest.approx(expected)
    assert (got[~mask] == 0).all()


def test_gae_by_hand():
    """gamma 1, lambda 1/2, values 1, 2: delta_2 = 5 - 2 = 3, delta_1 = 2 - 1 = 1, A_1 = 1 + 3/2."""
    advantages, returns = gae(float64([[0, NAN, 5]]), float64([[1, NAN, 2]]), mask_of("101"), gae_lambda=0.5)
    assert advantages.tolist() == [[2.5, 0, 3]] and returns.tolist() == [[3.5, 0, 5]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae_against_its_definition(seed, gamma, lam):
    """A_t = sum of (gamma lambda)^(s - t) delta_s."""
    mask, rewards, values = random_case(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    rows = zip(*(own_tokens(x, mask) for x in (advantages, returns, rewards, values)), strict=True)
    for got, got_returns, r, v in rows:
        following = [*v[1:], 0]
        delta = [r[t] + gamma * following[t] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]
        assert got == pytest.approx(expected)
        assert got_returns == pytest.approx([a + b for a, b in zip(expected, v, strict=True)])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_with_lambda_1_is_return_minus_value():
    mask, rewards, values = random_case(7)
    advantages, returns = gae(rewards, values, mask, gae_lambda=1.0)
    to_go = reward_to_go(rewards, mask)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0))


# ---- whitening ----


def test_whiten_by_hand():
    """1, 2, 3: variance 1 over n - 1, 2/3 over n."""
    x, mask = float64([[1, NAN, 2], [3, NAN, NAN]]), mask_of("101", "100")
    assert whiten(x, mask, eps=0.0).tolist() == [[-1, 0, 0], [1, 0, 0]]
    assert whiten(x, mask, eps=0.0, bessel=False)[1, 0].item() == pytest.approx(math.sqrt(3 / 2))
    assert whiten(x, mask, eps=3.0)[1, 0].item() == pytest.approx(1 / 2)  # 1 / sqrt(1 + 3)


@pytest.mark.parametrize("bessel", [True, False])
def test_whitening_one_token_equal_tokens_and_none(bessel):
    for x, mask in ((float64([[7, 9]]), mask_of("10")), (float64([[0.1] * 9]), mask_of("1" * 9))):
        assert whiten(x, mask, bessel=bessel).abs().max() < 1e-9
    assert whiten(float64([[NAN, 1]]), mask_of("00"), bessel=bessel).tolist() == [[0, 0]]


def test_whitening_over_ranks_is_whitening_of_the_whole():
    """Moments of the parts, added up, give each part what it has in the whole."""
    mask, x, _ = random_case(3)
    whole = whiten(x, mask)
    total = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    parts = [whiten(x[rows], mask[rows], reduce=lambda _: total) for rows in (slice(2), slice(2, None))]
    torch.testing.assert_close(torch.cat(parts), whole)


# ---- REINFORCE++ ----


def test_reinforce_pp_credits_tokens_before_a_tool_span():
    """KL 0: every token of a response has its score to come, three have 2 and two have -1."""
    mask = mask_of("1011", "1100")
    got = reinforce_pp(token_rewards(float64([2, -1]), mask), mask, bessel=False)
    mean = (3 * 2 - 2 * 1) / 5
    std = math.sqrt((3 * (2 - mean) ** 2 + 2 * (-1 - mean) ** 2) / 5)
    up, down = (2 - mean) / std, (-1 - mean) / std
    assert got.flatten().tolist() == pytest.approx([up, 0, up, up, down, down, 0, 0], abs=1e-6)


def test_reinforce_pp_with_a_baseline():
    """Scores 3, 1 of one prompt and 5, 5 of another: +1, -1, 0, 0, over 1, 2, 1 and 0 tokens."""
    mask = mask_of("10", "11", "01", "00")
    got = reinforce_pp_baseline(torch.tensor([3.0, 1.0, 5.0, 5.0]), torch.tensor([9, 9, 2, 2]), mask, bessel=False)
    mean = (1 - 2 + 0) / 4
    std = math.sqrt(((1 - mean) ** 2 + 2 * (-1 - mean) ** 2 + mean**2) / 4)
    high, low, zero = ((x - mean) / std for x in (1, -1, 0))
    assert got.flatten().tolist() == pytest.approx([high, 0, low, low, 0, zero, 0, 0], abs=1e-6)


def test_reinforce_pp_with_a_baseline_where_part_of_the_step_is_elsewhere():
    """Rows 2 and 0 are here: their group means and the moments are the whole step's."""
    scores, groups = torch.tensor([3.0, 1.0, 5.0, 4.0]), torch.tensor([9, 9, 2, 2])
    mask = mask_of("10", "11", "01", "11")
    whole = reinforce_pp_baseline(scores, groups, mask)
    total = moments(torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).expand(4, 2), mask)
    here = torch.tensor([2, 0])
    got = reinforce_pp_baseline(scores, groups, mask[here], here=here, reduce=lambda _: total)
    torch.testing.assert_close(got, whole[here])


# ---- PRIME ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_prime_against_its_formula(seed, gamma):
    """Groups of 3 and 2, in any order; response 3 has no token, so its one partner has no process term."""
    mask, rewards, _ = random_case(seed)
    mask[:, 0] |= torch.tensor([True, True, True, False, True])
    rewards = torch.where(mask & rewards.isnan(), 0.3, rewards)
    groups, outcomes = [5, 2, 5, 2, 5], [1.0, 0.0, 0.0, 1.0, 1.0]
    got = prime(rewards, float64(outcomes), torch.tensor(groups), mask, gamma=gamma, process_coef=2, outcome_coef=3)
    own = own_tokens(rewards, mask)
    for i, ours in enumerate(own_tokens(got, mask)):
        others = [j for j in range(5) if groups[j] == groups[i] and j != i]
        means = [sum(own[j]) / len(own[j]) for j in others if own[j]]
        outcome = outcomes[i] - sum(outcomes[j] for j in others) / len(others)
        for t, value in enumerate(ours):
            process = 0.0
            if means:
                base = sum(means) / len(means)
                process = sum(gamma ** (s - t) * (own[i][s] - base) for s in range(t, len(own[i])))
            assert value == pytest.approx(2 * process + 3 * outcome)
    assert (got[~mask] == 0).all()


def test_prime_of_a_group_of_one_is_zero():
    got = prime(float64([[1, 2]]), float64([1]), torch.tensor([0]), mask_of("11"))
    assert got.tolist() == [[0, 0]]


# ---- the rest ----


def test_distillation_is_the_difference_token_by_token():
    got = distillation(float64([[-1, NAN, -3]]), float64([[-2, 5, -1]]), mask_of("101"))
    assert got.tolist() == [[-1, 0, 2]]


def test_distillation_has_the_gradient_of_reverse_kl():
    """-A logp over all tokens that the policy may sample, against the divergence itself."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    teacher = float64([0.2, 0.5, 0.3]).log()
    logps = logits.log_softmax(0)
    advantages = distillation(logps.detach()[None], teacher[None], torch.ones(1, 3, dtype=torch.bool))[0]
    (surrogate,) = torch.autograd.grad(-(logps.detach().exp() * advantages * logps).sum(), logits, retain_graph=True)
    (truth,) = torch.autograd.grad((logps.exp() * (logps - teacher)).sum(), logits)
    torch.testing.assert_close(surrogate, truth)


def test_pad():
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([3.0])]
    assert pad(parts).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert pad([torch.tensor([True]), torch.tensor([True, True])]).tolist() == [[True, False], [True, True]]
