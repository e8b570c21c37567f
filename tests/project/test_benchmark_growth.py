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


def test_memory_of_long_sequences_is_drawn_in_gib_beside_what_was_planned():
    (axes,) = load("growth").length_figure(MEMORY, {"uniform": [(32768, 32.0)]}).axes
    drawn = lines(axes)
    assert drawn["uniform"] == ([1024, 4096, 32768], [1024 * 60 / 2**20, 4096 * 60 / 2**20, 32768 * 30 / 2**20])
    assert drawn["uniform, planned"] == ([32768], [1.0])
    assert axes.get_ylim()[0] == 0


def test_the_tables_of_long_sequences_and_of_attention_hold_their_rows(tmp_path):
    header = "benchmark,what,implementation,metric,unit,x,p50,p20,p80,device,versions,commit,date,command\n"
    over = "peak memory over model and gradients per token"
    values = {"CPU time of a step": 7.4, f"{over}, freed memory given back": 5.25, f"{over}, by plan": 5.5}
    x = '"random Llama (1 layer, 16 wide, 4096 words), 1 x 131072 tokens, float32"'
    rows = [f'length,w,frozen,"{metric}",u,{x},{value},1,1,d,v,c,d,c\n' for metric, value in values.items()]
    rows += [
        f"attention,w,{way},loss from 0 to 8192,nats,a text,{loss},1,1,d,v,c,d,c\n"
        for way, loss in (("a", 2), ("b", 3))
    ]
    (tmp_path / "rows.csv").write_text(header + "".join(rows))
    table = load("bench/table")
    results = table.Results(tmp_path / "rows.csv")
    assert "| 131,072 | 5.25 (5.50), 7 s |" in table.length_table(results)
    assert table.attention_table(results)[2:] == [
        "| tokens | 0 to 8,192 |",
        "|---|---|",
        "| a | 2.00 |",
        "| b | 3.00 |",
    ]
