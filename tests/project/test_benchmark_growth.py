"""The figure of the growth benchmark: its numbers, read back from the axes."""

from benchmark import load

TIMES = {"uniform": [(1024, 90.0), (4096, 140.0), (32768, 700.5)], "self-scored dense": [(1024, 150.0), (4096, 210.0)]}
MEMORY = {"uniform": [(1024, 60.0), (4096, 60.0), (32768, 30.0)], "self-scored dense": [(1024, 61.0)]}


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_equal_distances_are_equal_ratios_of_time_and_memory_is_drawn_from_0():
    times, memory = load("growth").growth_figure(TIMES, MEMORY).axes
    assert times.get_yscale() == "log"
    assert memory.get_ylim()[0] == 0
    assert lines(memory) == {"uniform": ([1024, 4096, 32768], [60, 60, 30]), "self-scored dense": ([1024], [61])}
    assert lines(times) == {
        "uniform": ([1024, 4096, 32768], [90, 140, 700.5]),
        "self-scored dense": ([1024, 4096], [150, 210]),
    }
    assert [label.get_text() for label in memory.get_xticklabels()] == ["1k", "4k", "32k"]
