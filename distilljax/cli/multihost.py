"""Several processes: ``jax.distributed`` is started here, and nowhere else."""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from typing import NoReturn

from distilljax._checks import fail
from distilljax.cli.peers import Peers


def initialize(args: Namespace) -> None:
    """Join the other processes if asked to; before anything else touches a device."""
    global PEERS
    PEERS = _join(args)


# Who watches the other processes of this one, if there are any.
PEERS: Peers | None = None


def _join(args: Namespace) -> Peers | None:
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
        return None
    import jax
    from jax._src import distributed  # its store has no public name

    seconds = args.connect_timeout_secs
    options = {**given, "initialization_timeout": seconds + 60}
    # `Peers` says which process is gone, before JAX aborts with a page of C++
    options["heartbeat_timeout_seconds"] = 100 + 3 * args.peer_timeout_secs
    if None not in given.values():
        # else SLURM's environment would leave a process one GPU of its node
        options["cluster_detection_method"] = "deactivate"
    # at a deadline of its own JAX aborts, with a page of C++
    deadline = threading.Timer(seconds, _give_up, [args])
    deadline.daemon = True
    deadline.start()
    try:
        # on TPU, GKE and SLURM, JAX finds by itself what is not given
        jax.distributed.initialize(**options)
    except ValueError as error:
        fail(
            "distilljax",
            "--multihost",
            "find the other processes",
            f"an error of JAX: {error}",
            "Say where they are: --coordinator HOST:PORT --num-processes N "
            "--process-id I. On TPU slices, GKE and SLURM JAX finds them by itself.",
        )
    finally:
        deadline.cancel()
    if jax.process_count() > 1:
        peers = Peers(
            distributed.global_state.client,
            jax.process_index(),
            jax.process_count(),
            args.peer_timeout_secs,
        )
        peers.start()
        return peers
    return None


def _give_up(args: Namespace) -> NoReturn:
    """End the process: its main thread waits where no exception reaches it."""
    where = args.coordinator or "the address that JAX has found"
    if args.process_id == 0:
        rule = f"be reached by all {args.num_processes} processes"
        got = f"fewer at {where}"
    else:
        rule, got = "be reached", f"no answer from {where}"
    print(
        f"error: distilljax: --coordinator must {rule} within "
        f"{args.connect_timeout_secs} s, got {got}. See that process 0 runs, that the "
        "others reach its port, and that each has a --process-id of its own; "
        "--connect-timeout-secs waits longer.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
