"""What `PROTOCOL` stands for is pinned: functions that decide what a timing says."""

from pins import statements_hash

from vitx.measure import compare, machine, stats, subjects, tasks, timing

PINNED = (4, "9c29a65c884b2730")
"""`PROTOCOL`, and the hash of the statements that it stands for."""
FUNCTIONS = (
    timing.PairTimes.log_ratios,
    timing.PairTimes.rates,
    timing.time_rounds,
    timing.warm_up,
    timing.iterations_of,
    timing.log_ratios,
    timing.orders,
    timing._round,
    timing._block,
    timing.time_block,
    subjects.as_timed,
    subjects.prepare,
    subjects.make_step,
    subjects.step_config,
    tasks._arms,
    machine.Machine.is_disturbed,
    machine.Watch,
    machine.keep_memory,
    machine.cpu_seconds,
    machine.core_numbers,
    compare.summarise,
    stats.mean_interval,
    stats.paired_ratio,
    stats.noise_floor,
    stats.speed_verdict,
)


def test_the_protocol_is_raised_with_what_it_stands_for():
    actual = timing.PROTOCOL, statements_hash(*FUNCTIONS)
    assert actual == PINNED, (
        f"What decides a timing has changed. If a timing may now say something else, raise "
        f"`PROTOCOL`; if no number changes, only update the pin. PINNED = {actual}"
    )
