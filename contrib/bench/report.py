"""The tables and the JSON."""

from statistics import median

from figures import Row
from jobs import HOST, Caches, Job, Section
from scale import Table
from turns import Results


def amount(value: float | None, unit: str = "") -> str:
    """Three digits or so: 12.3k, 4870, 3.1."""
    if value is None:
        return "-"
    if unit == "IOPS" and value >= 1000:
        return f"{value / 1000:.1f}k" if value < 100_000 else f"{value / 1000:.0f}k"
    if unit == "s" and value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread(values: list[float], unit: str) -> str:
    return f"{amount(min(values), unit)}-{amount(max(values), unit)}" if values else "-"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be; the first to the left, figures to the right.

    A row of one cell is a heading between rows.
    """
    whole = [row for row in [head, *rows] if len(row) > 1]
    widths = [max(len(row[at]) for row in whole) for at in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        if len(row) == 1:
            print(f"\n{row[0]}")
            continue
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())


def print_environment(facts: dict) -> None:
    print("; ".join(facts["programs"]))
    print(
        f"Linux {facts['kernel']}, {facts['cpus']} CPUs, {facts['memory_mib']} MiB of memory,"
        f" {facts['filesystem']} at {facts['directory']}, load {facts['load_before']:.1f} before"
    )
    print(f"disk of {facts['size'] >> 20} MiB, medians of {facts['rounds']}, the targets in turn")
    if facts["load_before"] > 0.5:
        print("The machine is not idle: ratios may hold, absolute figures will not.")


def goal(value: float | None) -> str:
    return f">= {value:g}" if value else ""


def job_row(results: Results, job: Job) -> list[str]:
    peers = results.peers()
    durable = job.section in (Section.FSYNC, Section.WRITEBACK)
    hollow = results.hollow if durable else set()
    cells = [f"  {job.title}", job.unit]
    cells += [amount(results.median(job, name), job.unit) for name in (job.beside, job.ours)]
    cells += [ratio(results.ratio(job, job.beside)), goal(job.floor)]
    cells += [amount(results.median(job, name), job.unit) + "*" * (name in hollow) for name in peers]
    if peers:
        cells += [ratio(results.ratio(job, results.best_peer(job))), goal(job.lead)]
    return cells + [spread(results.of(job, name), job.unit) for name in (job.beside, job.ours)]


def print_jobs(results: Results) -> None:
    """One table; sections in the order of `Section`."""
    peers = results.peers()
    head = ["", "", HOST, "cowslip", "/host", "target", *peers, *(["/best peer", "target"] if peers else [])]
    head += ["host min-max", "cowslip min-max"]
    rows = []
    for section in Section:
        jobs = [job for job in results.jobs if job.section is section]
        if jobs:
            rows += [[section.value], *(job_row(results, job) for job in jobs)]
    print()
    print_table(head, rows)
    print()
    if results.hollow:
        names = " and ".join(sorted(results.hollow))
        print(f"* fsync of {names} does nothing: not the same work, so no best peer in these rows")
    for note in dict.fromkeys(results.notes):
        print(f"note: {note}")


def print_figures(rows: list[Row]) -> None:
    table = []
    for row in rows:
        host = amount(median(row.host)) if row.host else ""
        cells = [f"  {row.title}", row.unit, amount(row.value), row.goal, host]
        table.append([*cells, spread(row.samples, row.unit)])
    print()
    print_table(["", "", "cowslip", "target", "host file", "min-max"], table)
    for row in rows:
        if row.note:
            print(f"note: {row.title}: {row.note}")


def jobs_as_json(results: Results) -> dict:
    listed = []
    for job in results.jobs:
        best = results.best_peer(job)
        listed.append(
            {
                "key": job.key,
                "title": job.title,
                "section": job.section.name.lower(),
                "caches": job.caches.name.lower(),
                "unit": job.unit,
                "fio": list(job.options),
                "medians": {name: results.median(job, name) for name in results.names},
                "samples": {name: results.of(job, name) for name in results.names},
                "target": job.ours,
                "beside": job.beside,
                "ratio_to_host": results.ratio(job, job.beside),
                "target_ratio": job.floor,
                "target_ratio_to_best_peer": job.lead,
                "best_peer": best,
                "ratio_to_best_peer": results.ratio(job, best),
            }
        )
    caches = {kind.name.lower(): kind.value for kind in Caches}
    fsync = sorted(results.hollow)
    return {"jobs": listed, "caches": caches, "fsync_does_nothing": fsync, "notes": results.notes}


def figures_as_json(rows: list[Row]) -> dict:
    return {
        "figures": [
            {
                "key": row.key,
                "title": row.title,
                "unit": row.unit,
                "value": row.value,
                "samples": row.samples,
                "host": row.host,
                "target": row.goal,
                "note": row.note,
            }
            for row in rows
        ]
    }


def print_scale(table: Table) -> None:
    """A row for each variant; beside each figure its ratio to the first of the group."""
    rows, group = [], None
    for variant in table.variants:
        if variant.group != group:
            group = variant.group
            rows.append([f"by {group}"])
        cells = [f"  {variant.title}"]
        for job in table.jobs:
            cells += [amount(variant.median(job.key), job.unit), ratio(table.ratio(variant, job.key))]
        rows.append(cells)
    print("\nThe same work on more and on larger; ratios are to the first of each group")
    head = [""]
    for job in table.jobs:
        head += [f"{job.title}, {job.unit}", ""]
    print_table(head, rows)


def scale_as_json(table: Table) -> dict:
    return {
        "scale": [
            {
                "group": variant.group,
                "title": variant.title,
                "samples": variant.samples,
                "ratios": {job.key: table.ratio(variant, job.key) for job in table.jobs},
            }
            for variant in table.variants
        ]
    }
