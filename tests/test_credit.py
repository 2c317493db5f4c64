"""Tests of credit by syllable: positions of errors, and the resulting advantages (in veRL: test_trainer.py)."""

import numpy as np
import pytest

from tts_grpo.text.errors import align_texts, locate_errors
from tts_grpo.training.credit import encode, mismatched, syllable_advantages

# Three syllables that begin with tokens 0, 4 and 9.
STARTS = (0, 4, 9)


def test_an_error_is_charged_to_the_tokens_of_its_syllable():
    right, wrong = encode((0, 0, 0), STARTS), encode((0, 0.6, 0), (0, 3, 7))
    first, second = syllable_advantages([right, wrong], [1.0, 0.4], [12, 10])
    np.testing.assert_allclose(first, [0] * 4 + [0.3] * 5 + [0] * 3, atol=1e-7)
    np.testing.assert_allclose(second, [0] * 3 + [-0.3] * 4 + [0] * 3, atol=1e-7)


def test_syllable_advantages_sum_to_grpos_advantage():
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 0.2, (8, 3))
    scores = rng.uniform(0, 1, 8) * (1 - losses.sum(1))  # some of the loss belongs to no syllable
    advantages = syllable_advantages([encode(row.tolist(), STARTS) for row in losses], scores, [12] * 8)
    totals = [row[list(STARTS)].sum() for row in advantages]
    np.testing.assert_allclose(totals, scores - scores.mean(), atol=1e-6)


def test_a_bad_rollout_has_a_loss_at_each_syllable():
    """It weighs as much as a rollout that lost everything at its syllables."""
    bad, right, wrong = encode((), ()), encode((0, 0, 0), STARTS), encode((1 / 3, 1 / 3, 1 / 3), STARTS)
    first, second = syllable_advantages([bad, right], [0.0, 1.0], [2, 12])
    np.testing.assert_allclose(first, [-1 / 6] * 2, atol=1e-6)
    np.testing.assert_allclose(second, [1 / 6] * 12, atol=1e-6)
    third, fourth = syllable_advantages([wrong, right], [0.0, 1.0], [12, 12])
    np.testing.assert_allclose([*third, *fourth], [-1 / 6] * 12 + [1 / 6] * 12, atol=1e-6)
    assert not np.concatenate(syllable_advantages([bad, bad], [0.0, 0.0], [2, 3])).any()


def test_a_loss_that_belongs_to_no_syllable_is_shared_evenly():
    """Rollouts without recognition errors that differ in another part of the reward, such as the pace."""
    right = encode((0, 0, 0), STARTS)
    first, second = syllable_advantages([right, right], [1.0, 0.4], [12, 12])
    np.testing.assert_allclose([*first, *second], [0.1] * 12 + [-0.1] * 12, atol=1e-6)
    some = encode((0, 0.3, 0), STARTS)  # half of the loss is at the second syllable
    _, third = syllable_advantages([right, some], [1.0, 0.4], [12, 12])
    np.testing.assert_allclose(third, [-0.05] * 4 + [-0.2] * 5 + [-0.05] * 3, atol=1e-6)


def test_division_by_the_groups_standard_deviation():
    encoded = [encode((0, 0, 0), STARTS), encode((0, 0.6, 0), STARTS)]
    plain, divided = (syllable_advantages(encoded, [1.0, 0.4], [12, 12], by_std) for by_std in (False, True))
    np.testing.assert_allclose(divided[0], plain[0] / np.std([1.0, 0.4], ddof=1), rtol=1e-4)


def test_a_rollout_with_other_syllables_gets_the_credit_of_the_utterance():
    group = [encode((0, 0.5), (0, 4)), encode((0, 0, 0), STARTS), encode((0, 0, 0), STARTS)]
    first, *others = syllable_advantages(group, [0.5, 1.0, 1.0], [8, 12, 12])
    np.testing.assert_allclose(first, [(0.5 - 2.5 / 3) / 3] * 8, atol=1e-6)
    np.testing.assert_allclose(others, [[0.5 / 9] * 12] * 2, atol=1e-6)
    assert mismatched(group) == 1 and mismatched([encode((), ()), *group[1:]]) == 0


def test_errors_in_speech_that_a_rollout_continues_are_charged_to_no_token():
    """Syllables that begin before the response have negative positions."""
    right, wrong = encode((0, 0, 0), (-6, -2, 4)), encode((0.3, 0.3, 0), (-6, -2, 4))
    first, second = syllable_advantages([right, wrong], [1.0, 0.4], [9, 9])
    np.testing.assert_allclose(first, [0.15] * 4 + [0] * 5, atol=1e-7)
    np.testing.assert_allclose(second, [-0.15] * 4 + [0] * 5, atol=1e-7)


@pytest.mark.parametrize(
    ("hypothesis", "onsets_s", "errors", "times_s"),
    [
        ("天山水火", (0.1, 0.3, 0.5, 0.7), [0, 0, 0, 0], [0.1, 0.3, 0.5, 0.7]),
        ("天人水火", (0.1, 0.3, 0.5, 0.7), [0, 1, 0, 0], [0.1, 0.3, 0.5, 0.7]),
        ("天水火", (0.1, 0.5, 0.7), [0, 1, 0, 0], [0.1, 0.3, 0.5, 0.7]),  # placed between its neighbours
        ("天山水人火", (0.1, 0.3, 0.5, 0.6, 0.7), [0, 0, 1, 0], [0.1, 0.3, 0.5, 0.7]),
        ("人天山水火", (0.0, 0.1, 0.3, 0.5, 0.7), [1, 0, 0, 0], [0.1, 0.3, 0.5, 0.7]),
        ("天山水", (0.1, 0.3, 0.5), [0, 0, 0, 1], [0.1, 0.3, 0.5, 0.7]),
        ("", (), [1, 1, 1, 1], [0.18, 0.36, 0.54, 0.72]),
    ],
)
def test_errors_are_located(hypothesis, onsets_s, errors, times_s):
    found, times = locate_errors(align_texts("天山水火", hypothesis, "toneless"), onsets_s, 0.9)
    assert found == errors and sum(found) == align_texts("天山水火", hypothesis, "toneless").counts.errors
    np.testing.assert_allclose(times, times_s, atol=1e-9)


def test_units_without_times_are_an_error():
    with pytest.raises(ValueError, match="character 1, but only 1 onsets"):
        locate_errors(align_texts("天山", "天山", "toneless"), (0.1,), 1.0)


def test_errors_of_another_reading_are_mapped_to_the_usual_one():
    """All rollouts of a group then have the same number of syllables, whichever reading they used."""
    for transcript in ("二零二四年", "两千零二十四年", "二零二三年", "两千零二十三年"):
        times = [0.1 * (i + 1) for i in range(len(transcript))]
        found, starts = locate_errors(align_texts("2024年", transcript, "toneless"), times, 1.0)
        assert len(found) == len(starts) == 5 and sum(found) == ("三" in transcript)
        assert found[3] == ("三" in transcript) and starts == sorted(starts)


@pytest.mark.parametrize("transcript", ["二〇〇八年", "𠮷a 二〇〇八 年", "2008年", "gpt 二零零八年！"])
def test_onsets_are_accepted_for_any_transcript(transcript):
    found, _ = locate_errors(align_texts("二零零八年", transcript, "toneless"), [0.1] * len(transcript), 1.0)
    assert len(found) == 5


@pytest.mark.parametrize(("losses", "score"), [((0, 0.3, 0), 0.8), ((0, 0, 0), -0.2), ((0, 0, 0), 1.5)])
def test_losses_that_do_not_fit_the_reward_are_refused(losses, score):
    with pytest.raises(ValueError, match=f"the reward {score} has a loss of .*credit=utterance"):
        syllable_advantages([encode(losses, STARTS), encode((0, 0, 0), STARTS)], [score, 1.0], [12, 12])
