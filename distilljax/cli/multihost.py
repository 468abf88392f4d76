"""Several processes: ``jax.distributed`` is started here, and nowhere else."""

from __future__ import annotations

from argparse import Namespace

from distilljax._checks import fail


def initialize(args: Namespace) -> None:
    """Join the other processes if asked to; before anything else touches a device."""
    given = {
        "coordinator_address": args.coordinator,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    if not args.multihost:
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            fail(
                "distilljax",
                "--multihost",
                "be given with --coordinator, --num-processes and --process-id",
                "not given",
                "Add --multihost, or leave them out for a single process.",
            )
        return
    import jax

    options = {**given, "initialization_timeout": args.connect_timeout_secs}
    if None not in given.values():
        # else SLURM's environment would leave a process one GPU of its node
        options["cluster_detection_method"] = "deactivate"
    try:
        # on TPU, GKE and SLURM, JAX finds by itself what is not given
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        where = args.coordinator or "the one that JAX has found"
        raise ConnectionError(
            f"distilljax: --coordinator must be reached within "
            f"{args.connect_timeout_secs} s, and by all {args.num_processes or ''} "
            f"processes, got no answer at {where}. See that process 0 runs, and that "
            "its port is open; --connect-timeout-secs waits longer."
        ) from error
