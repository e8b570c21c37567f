"""Defaults that follow from the length of the rows, and settings that do not fit it."""

from pathlib import Path

import pytest

from tokenweight.evaluate import EvalSettings
from tokenweight.evaluate.settings import make_plan


def plan(length, **options):
    return make_plan(EvalSettings("model", Path("rows"), Path("out"), **options), length)


@pytest.mark.parametrize(
    ("length", "edges", "sizes", "short", "long_context", "whose", "probe_lengths"),
    [
        (8, [0, 2, 4, 8], [2, 4], 2, [2, 1], "a quarter", [2, 4, 8]),
        (300, [0, 75, 150, 300], [75, 150], 75, [75, 56], "a quarter", [75, 150, 300]),
        (512, [0, 256, 512], [256], 128, [128, 96], "a quarter", [128, 256, 512]),
        (1000, [0, 256, 512, 1000], [256], 250, [250, 187], "a quarter", [250, 500, 1000]),
        (
            5120,
            [0, 256, 512, 1024, 2048, 4096, 5120],
            [256, 512, 1024, 2048],
            1024,
            [1280, 960],
            "a quarter",
            [1280, 2560, 5120],
        ),
        (
            5121,
            [0, 256, 512, 1024, 2048, 4096, 5121],
            [256, 512, 1024, 2048],
            1024,
            [5120, 1024],
            "the authors",
            [1280, 2560, 5120],
        ),
    ],
)
def test_defaults_follow_from_the_length_of_the_rows(length, edges, sizes, short, long_context, whose, probe_lengths):
    found = plan(length)
    assert (found.length, found.edges, found.sizes, found.short) == (length, edges, sizes, short)
    assert found.long_context == long_context
    assert whose in found.long_context_is
    assert found.half == probe_lengths[1]
    assert found.probe_lengths == probe_lengths
    assert (found.families, found.depths) == (["single", "multi_key", "variable_tracking"], [0.1, 0.5, 0.9])


def test_what_is_asked_for_is_taken(tmp_path):
    (tmp_path / "text").write_text("A haystack.")
    found = plan(
        64, sizes="2,63", short=64, long_size=63, probes="single", probe_lengths="50,9", depths="0,1", num_probes=1
    )
    assert (found.sizes, found.short, found.long_context, found.long_context_is) == ([2, 63], 64, [63, 47], "as given")
    assert (found.families, found.probe_lengths, found.depths, found.num_probes) == (["single"], [50, 9], [0, 1], 1)
    found = plan(64, probes="single", distances="8,32")
    assert (found.depths, found.distances) == ([], [8, 32])
    assert plan(64, long_size=8, long_stride=7).long_context == [8, 7]
    assert plan(8192, sizes="512,2k,0_004K").sizes == [512, 2048, 4096]
    hashes = {plan(64, haystack=path).comparable()["haystack_sha256"] for path in (None, tmp_path / "text")}
    assert len(hashes) == 2


def test_settings_of_probes_do_not_matter_without_probes():
    assert plan(64, probes="none", num_probes=3, depths="0.3", probe_lengths="9") == plan(64, probes="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "16,64"}, "sizes 16,64: expected rising numbers from 2 to 63, below the 64 tokens of a sequence"),
        ({"sizes": "16,8"}, "sizes 16,8: expected rising numbers"),
        ({"sizes": "16,16"}, "sizes 16,16: expected rising numbers"),
        ({"sizes": "1"}, "sizes 1: expected rising numbers"),
        ({"sizes": "few"}, "sizes few: expected numbers, separated by commas"),
        ({"sizes": ""}, "sizes : expected numbers"),
        ({"short": 1}, "short 1: expected 2 to 64 tokens"),
        ({"short": 65}, "short 65: expected 2 to 64 tokens"),
        ({"long_size": 64}, "long_size 64: expected 2 to 63"),
        ({"long_size": 8, "long_stride": 8}, "long_stride 8: expected 1 to 7, below long_size"),
        ({"long_stride": 8}, "long_stride 8: expected long_size beside it"),
        ({"probes": "sinlge"}, "probes sinlge: expected none, or some of single, multi_key, "),
        ({"probes": "single,single"}, "probes single,single: expected each family once"),
        ({"probe_lengths": "5x"}, "probe_lengths 5x: expected numbers"),
        ({"depths": "0.5,1.1"}, r"depths 0.5,1.1: expected numbers from 0 \(beginning\) to 1 \(end\)"),
        ({"depths": "nan"}, "depths nan: expected numbers from 0"),
        ({"distances": "4,64"}, "distances 4,64: expected 0 or more tokens, below the 64 of the longest probe"),
        ({"num_probes": 0}, "num_probes 0: expected at least 1"),
        ({"max_tokens": 0}, "max_tokens 0: expected at least 1"),
        (
            {"attention": "dual-chunk", "attn_implementation": "eager"},
            "attn_implementation eager: expected none beside",
        ),
        ({"attention": "dual-chunk", "heads": True}, "heads true: expected none beside attention"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        plan(64, **options)


def test_rows_too_short_for_any_context_are_refused():
    with pytest.raises(ValueError, match="rows has sequences of up to 7 tokens: expected at least 8"):
        plan(7)
