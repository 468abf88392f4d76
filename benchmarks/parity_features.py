"""The comparisons of losses between features, and of relations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import parity_papers as papers
from parity_cases import (
    CHANNELS,
    EARLY,
    HEIGHT,
    IMAGES,
    LATE,
    POINTS,
    SPAN,
    Arrays,
    Case,
    Factor,
    of,
)

from distilljax import losses

NEURONS = HEIGHT * SPAN * CHANNELS


def rooted(x: Arrays) -> Any:
    """The distance of attention maps that is not squared."""
    squares = losses.attention_transfer(x["student"], x["teacher"])
    return losses.masked_mean(jnp.sqrt(squares))


def flow(x: Arrays) -> Any:
    """Of the pairs of early and late maps."""
    student, teacher = (
        (x[f"{side}_early"], x[f"{side}_late"]) for side in ("student", "teacher")
    )
    return losses.masked_mean(losses.flow_of_solution(student, teacher))


def information(x: Arrays) -> Any:
    """With a learned scale for each channel, which gets a gradient too."""
    values = losses.variational_information(
        x["student"], x["teacher"], raw_scale=x["student_scale"]
    )
    return losses.masked_mean(values)


FEATURES = (
    Case(
        "hidden_mse",
        of(losses.hidden_mse),
        "points",
        "torch mse_loss",
        why="What torchdistill takes for the hints of FitNets; a mean over the width.",
    ),
    Case(
        "hidden_cosine",
        of(losses.hidden_cosine),
        "points",
        "torch cosine_embedding_loss",
        why="With target 1, as DistilBERT calls it.",
    ),
    Case(
        "attention_transfer",
        of(losses.attention_transfer),
        "maps",
        "torchdistill ATLoss",
        theirs={"mode": "code"},
        factor=Factor("1 / (height width)", 1 / (HEIGHT * SPAN)),
        why="The authors' code takes the mean over positions of the square, hence its "
        "weight of 1000.",
    ),
    Case(
        "attention_transfer",
        rooted,
        "maps",
        "torchdistill ATLoss",
        theirs={"mode": "paper"},
        why="Equation 2 of the paper does not square: the root of ours, for each "
        "image.",
    ),
    Case(
        "activation_boundary",
        of(losses.activation_boundary),
        "maps",
        "torchdistill AltActTransferLoss",
        {"margin": 1.0},
        factor=Factor("neurons", NEURONS),
        why="A sum over the neurons of an example, as in the paper; ours is a mean.",
    ),
    Case(
        "variational_information",
        information,
        "gaussian",
        "torchdistill VIDLoss",
        why="A mean over channels and positions, where the paper has a sum.",
    ),
    Case(
        "variational_information",
        information,
        "gaussian",
        "torch gaussian_nll_loss",
        why="Without the constant log(2π) / 2 in both.",
    ),
    Case(
        "flow_of_solution",
        flow,
        "flows",
        "torchdistill FSPLoss",
        factor=Factor("early late", EARLY * LATE),
        why="The sum of the squared entries of the difference; ours is their mean.",
        differs="The sum of the lengths of the columns of the difference, not squared: "
        "its gradient does not fade as the matrices come near.",
        paper=papers.flow_of_solution,
    ),
    Case(
        "neuron_selectivity",
        of(losses.neuron_selectivity),
        "maps",
        why="torchdistill, which has most losses of its age, leaves it out.",
        paper=papers.neuron_selectivity,
    ),
    Case(
        "linear_cka",
        of(losses.linear_cka),
        "clouds",
        why="A measure of similarity elsewhere, and not a loss.",
        paper=papers.linear_cka,
    ),
    Case(
        "contrastive",
        of(losses.contrastive),
        "points",
        "torch cross_entropy of cosines",
        {"temperature": 0.5},
        why="InfoNCE: each anchor's label is its own teacher. The CRDLoss of "
        "torchdistill is the noise-contrastive estimate of its paper, another number.",
    ),
    Case(
        "attention_relation",
        of(losses.attention_relation),
        "states",
        "torch kl_div of relations",
        {"num_relation_heads": 3},
        why="Mean over heads and tokens, as ours.",
    ),
    Case(
        "attention_map_kl",
        of(losses.attention_map_kl),
        "scores",
        "torch kl_div of attention",
        why="Mean over heads and queries, as ours.",
    ),
)

RELATIONS = (
    Case(
        "rkd_distance",
        of(losses.rkd_distance),
        "clouds",
        "torchdistill RKDLoss",
        theirs={"dist_factor": 1.0, "angle_factor": 0.0},
        why="A mean over all ordered pairs, a point with itself included.",
    ),
    Case(
        "rkd_angle",
        of(losses.rkd_angle),
        "clouds",
        "torchdistill RKDLoss",
        theirs={"dist_factor": 0.0, "angle_factor": 1.0},
        why="A mean over all ordered triples, those that repeat a point included.",
    ),
    Case(
        "similarity_preserving",
        of(losses.similarity_preserving),
        "clouds",
        "torchdistill SPKDLoss",
        why="Rows are divided by their length.",
        differs="Rows are divided by the sum of the sizes of their entries: the second "
        "argument of `normalize(x, 1)` is the order of the norm, and not the axis.",
        paper=papers.similarity_preserving,
    ),
    Case(
        "probabilistic_transfer",
        of(losses.probabilistic_transfer),
        "clouds",
        "torchdistill PKTLoss",
        theirs={"eps": 0.0},
        factor=Factor("1 / batch", 1 / POINTS),
        why="It averages over the neighbours of an anchor too, hence the usual weight "
        "of 30000. ε = 0: its default of 1e-7 is more than the limit allows.",
    ),
    Case(
        "probabilistic_transfer",
        of(losses.probabilistic_transfer),
        "clouds",
        "torchdistill PKTLoss",
        theirs={"eps": 0.0},
        own={"include_self": False},
        factor=Factor("1 / batch", 1 / POINTS),
        why="The sums leave the anchor out. (Divided by the batch once more here.)",
        differs="Each anchor is its own neighbour, as in the authors' code.",
        paper=papers.probabilistic_transfer,
    ),
    Case(
        "correlation_congruence",
        of(losses.correlation_congruence),
        "clouds",
        "torchdistill CCKDLoss",
        {"gamma": 0.4, "order": 2},
        why="The squared distance of the tables over batch².",
        differs="The distance itself over batch², which is √ours / batch. (It was "
        "given features of length 1, to which ours scales by itself.)",
        paper=papers.correlation_congruence,
    ),
    Case(
        "embedding_relation",
        of(losses.embedding_relation),
        "clouds",
        "torch mse_loss of cosines",
        why="A mean over all ordered pairs.",
    ),
    Case(
        "embedding_relation",
        of(losses.embedding_relation),
        "clouds",
        "torch kl_div of cosines",
        {"temperature": 0.5},
        why="Over the others of each anchor.",
    ),
    Case(
        "interchannel_correlation",
        of(losses.interchannel_correlation),
        "maps",
        "torchdistill ChSimLoss",
        factor=Factor("channels / batch", CHANNELS / IMAGES),
        why="A sum over one of the two channels; and the mean over the batch is "
        "divided by the batch once more, which the authors' code does not: twice the "
        "batch, half the loss.",
    ),
    Case(
        "margin_mse",
        of(losses.margin_mse),
        "points",
        "torch mse_loss of margins",
        why="A mean over the negatives.",
    ),
)

CASES = (*FEATURES, *RELATIONS)
