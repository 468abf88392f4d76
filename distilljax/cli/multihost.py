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

    if None in given.values():
        # found by JAX itself on TPU, GKE and SLURM
        jax.distributed.initialize(**given)
    else:
        # else SLURM's environment would leave a process one GPU of its node
        jax.distributed.initialize(**given, cluster_detection_method="deactivate")
