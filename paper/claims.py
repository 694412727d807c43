"""What the paper claims and what the study saw: paired differences with their standard errors, and rank correlations.

    python -m paper.claims paper/results/fashion_mnist.csv

A difference is worse minus better, paired by seed, so that it is positive where the claim holds. With at least three
seeds a claim is *seen* if the mean difference is above twice its standard error, *reversed* if it is below minus twice
that, else *not seen*. How many are seen says something only beside how many chance alone would show.
"""

import itertools
import re
import statistics
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

from scipy.stats import spearmanr
from scipy.stats import t as student

import common
from common import UserError
from fid import KINDS
from paper.table import paper_results, read_results

ERROR = "validation_mse"
TITLES = {"reconstruction": "Rec.", "sample": "Sample", "interpolation": "Interp.", ERROR: "MSE"}


class Claim(NamedTuple):
    """`better` has the smaller distances than `worse`, both labels of rows, by the paper at `place`.

    A label of sigma points that does not say which stands for those that the paper chose for the data set.
    """

    text: str
    place: str
    better: str
    worse: str

    def on(self, dataset: str) -> "Claim":
        """The claim with the labels that the rows have on a data set."""
        points = common.DEFAULTS[dataset]["sigma_points"]
        better, worse = (re.sub(r"^((?:UT-VAE|UAE)\S* \dx)(?! [a-z])", rf"\1 {points}", label) for label in self[2:])
        return self._replace(better=better, worse=worse)


CLAIMS = [
    Claim("sigma points and mean image beat samples, KL, K = 8", "Sec. 6, Table 2", "UT-VAE 8x", "VAE 8x"),
    Claim("sigma points and mean image beat samples, KL, K = 4", "Tables 5, 6", "UT-VAE 4x", "VAE 4x"),
    Claim("sigma points and mean image beat samples, KL, K = 2", "App. D, Table 8", "UT-VAE 2x", "VAE 2x"),
    Claim("sigma points and mean image beat samples, W₂, K = 8", "Sec. 6, Table 2", "UT-VAE* 8x", "VAE* 8x"),
    Claim("sigma points and mean image beat samples, W₂, K = 4", "Tables 5, 6", "UT-VAE* 4x", "VAE* 4x"),
    Claim("sigma points and mean image beat samples, W₂, K = 2", "App. D, Table 8", "UT-VAE* 2x", "VAE* 2x"),
    Claim("random sigma points beat samples, KL, K = 2", "Tables 5, 6", "UT-VAE 2x random", "VAE 2x"),
    Claim("random sigma points beat samples, W₂, K = 2", "Tables 5, 6", "UT-VAE* 2x random", "VAE* 2x"),
    Claim("W₂ beats KL, samples, K = 8", "Sec. 6, Table 2", "VAE* 8x", "VAE 8x"),
    Claim("W₂ beats KL, samples, K = 4", "Table 6", "VAE* 4x", "VAE 4x"),
    Claim("W₂ beats KL, samples, K = 2", "App. D, Table 8", "VAE* 2x", "VAE 2x"),
    Claim("W₂ beats KL, samples, K = 1", "Table 6", "VAE* 1x", "VAE 1x"),
    Claim("W₂ beats KL, sigma points, K = 8", "Sec. 6, Table 2", "UT-VAE* 8x", "UT-VAE 8x"),
    Claim("W₂ beats KL, sigma points, K = 4", "Table 5", "UT-VAE* 4x", "UT-VAE 4x"),
    Claim("W₂ beats KL, sigma points, K = 2", "App. D, Table 8", "UT-VAE* 2x", "UT-VAE 2x"),
    Claim("W₂ beats KL, random sigma points, K = 2", "Table 5", "UT-VAE* 2x random", "UT-VAE 2x random"),
    Claim("W₂ with decoder regularisation beats KL with it", "App. D, Table 8", "VAE*-GP 2x", "VAE-GP 2x"),
    Claim("UAE beats UT-VAE*, K = 8", "Sec. 6, Table 2", "UAE 8x", "UT-VAE* 8x"),
    Claim("UAE beats UT-VAE*, K = 4", "Tables 5, 6", "UAE 4x", "UT-VAE* 4x"),
    Claim("UAE beats UT-VAE*, K = 2", "App. D, Table 8", "UAE 2x", "UT-VAE* 2x"),
    Claim("UAE beats the VAE, K = 8", "Sec. 6, Table 2", "UAE 8x", "VAE 8x"),
    Claim("UAE beats the VAE, K = 4", "Table 6", "UAE 4x", "VAE 4x"),
    Claim("UAE beats the VAE, K = 2", "Tables 3, 6", "UAE 2x", "VAE 2x"),
    Claim("UAE beats RAE-GP", "Sec. 6, Table 2", "UAE 8x", "RAE-GP"),
    Claim("RAE without regularisation beats the VAE", "Sec. 6, Table 2", "RAE-no-reg", "VAE 8x"),
    Claim("RAE-GP beats RAE without regularisation", "Table 2", "RAE-GP", "RAE-no-reg"),
    Claim("RAE-L2 beats RAE without regularisation", "Table 2", "RAE-L2", "RAE-no-reg"),
    Claim("RAE-SN beats RAE without regularisation", "Table 2", "RAE-SN", "RAE-no-reg"),
    Claim("the mean image beats per-sample error, samples", "Sec. 6, Table 3", "VAE† 2x", "VAE 2x"),
    Claim("the mean image beats per-sample error, sigma points", "Sec. 6, Table 3", "UT-VAE 2x", "UT-VAE† 2x"),
    Claim("more points: UT-VAE, 2 to 8", "App. C, Table 5", "UT-VAE 8x random", "UT-VAE 2x random"),
    Claim("more points: UT-VAE*, 2 to 8", "App. C, Table 5", "UT-VAE* 8x random", "UT-VAE* 2x random"),
    Claim("more points: UAE, 2 to 8", "App. C, Table 6", "UAE 8x", "UAE 2x"),
    Claim("more samples: VAE, 1 to 8", "Table 6", "VAE 8x", "VAE 1x"),
    Claim("more samples: VAE*, 1 to 8", "App. C, Table 6", "VAE* 8x", "VAE* 1x"),
    Claim("more samples: IWAE, 1 to 8", "Table 6", "IWAE 8x", "IWAE 1x"),
    *(
        Claim(
            f"the paper's choice of points beats {points}, {posterior}, K = {k}",
            "App. C, Table 5",
            f"{model} {k}x",
            f"{model} {k}x {points}",
        )
        for k, (model, posterior), points in itertools.product(
            (2, 4, 8), (("UT-VAE", "KL"), ("UT-VAE*", "W₂")), common.HEURISTICS
        )
    ),
    Claim("decoder regularisation harms sigma points under KL", "App. D", "UT-VAE 2x", "UT-VAE-GP 2x"),
    Claim("decoder regularisation helps the VAE", "App. D, Table 8", "VAE-GP 2x", "VAE 2x"),
    Claim("decoder regularisation helps the VAE*", "App. D, Table 8", "VAE*-GP 2x", "VAE* 2x"),
    Claim("a full covariance harms under KL, samples", "App. F, Table 9", "VAE 2x", "VAE-full 2x"),
    Claim("a full covariance harms under KL, sigma points", "App. F, Table 9", "UT-VAE 2x", "UT-VAE-full 2x"),
    Claim("a full covariance harms under KL, samples, GP", "App. F, Table 9", "VAE-GP 2x", "VAE-full-GP 2x"),
    Claim("a full covariance harms under KL, sigma points, GP", "App. F, Table 9", "UT-VAE-GP 2x", "UT-VAE-full-GP 2x"),
    Claim("a full covariance helps under W₂, samples", "App. F, Table 9", "VAE*-full 2x", "VAE* 2x"),
    Claim("a full covariance helps under W₂, sigma points", "App. F, Table 9", "UT-VAE*-full 2x", "UT-VAE* 2x"),
    Claim("a full covariance helps under W₂, samples, GP", "App. F, Table 9", "VAE*-full-GP 2x", "VAE*-GP 2x"),
    Claim("a full covariance helps under W₂, sigma points, GP", "App. F, Table 9", "UT-VAE*-full-GP 2x", "UAE 2x"),
    Claim("IWAE beats the VAE, K = 8", "Table 6", "IWAE 8x", "VAE 8x"),
    Claim("IWAE beats the VAE, K = 4", "Table 6", "IWAE 4x", "VAE 4x"),
    Claim("VAE* beats IWAE, K = 2", "App. C, Table 6", "VAE* 2x", "IWAE 2x"),
    Claim("UAE beats IWAE, K = 2", "App. C, Table 6", "UAE 2x", "IWAE 2x"),
    Claim("VAE* beats IWAE, K = 4", "App. C, Table 6", "VAE* 4x", "IWAE 4x"),
    Claim("UAE beats IWAE, K = 4", "App. C, Table 6", "UAE 4x", "IWAE 4x"),
    Claim("VAE* beats IWAE, K = 8", "App. C, Table 6", "VAE* 8x", "IWAE 8x"),
    Claim("UAE beats IWAE, K = 8", "App. C, Table 6", "UAE 8x", "IWAE 8x"),
    Claim("VAE* beats WAE-MMD", "App. G, Table 10", "VAE* 1x", "WAE-MMD"),
]
COLLAPSE = [  # judged by the number of collapsed dimensions
    Claim("KL collapses dimensions, W₂ does not, samples", "App. H, Fig. 5", "VAE* 1x", "VAE 1x"),
    Claim("KL collapses dimensions, W₂ does not, samples, K = 2", "App. H", "VAE* 2x", "VAE 2x"),
    Claim("KL collapses dimensions, W₂ does not, sigma points", "App. H", "UT-VAE* 2x", "UT-VAE 2x"),
]
OURS = [  # what the paper leaves open, as this code has it by default against another way
    Claim("W₂ against its square", "`--regularizer`", "UT-VAE* 2x", "UT-VAE*² 2x"),
    Claim("W₂ against two norms", "`--regularizer`", "UT-VAE* 2x", "UT-VAE*ⁿ 2x"),
    Claim("κ = 1/2 against 0.001, KL", "`--kappa`", "UT-VAE 2x", "UT-VAE 2x κ=0.001"),
    Claim("κ = 1/2 against 0.001, W₂", "`--kappa`", "UT-VAE* 2x", "UT-VAE* 2x κ=0.001"),
    Claim("KL in closed form against sampled, K = 1", "`iwae.py`", "VAE 1x", "IWAE 1x"),
]


def failure(label: str) -> bool:
    """Whether the paper itself calls a row a failure: random pairs (Appendix C) and full covariances under KL (F)."""
    return "pairs" in label or label.startswith(("VAE-full", "UT-VAE-full"))


def by_row(lines: list[dict[str, str]], measure: str) -> dict[str, dict[str, float]]:
    """The values of a measure by label and seed, of runs that did not fail."""
    values = {}
    for line in lines:
        if not line["error"] and line[measure]:
            values.setdefault(line["label"], {})[line["seed"]] = float(line[measure])
    return values


def verdict(differences: list[float]) -> tuple[str, float, float]:
    """`seen`, `not seen`, `reversed` or, below three seeds, `too few seeds`; mean difference and its standard error."""
    mean = statistics.mean(differences)
    if len(differences) < 3:
        return "too few seeds", mean, float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return "seen" if mean > 2 * error else "reversed" if mean < -2 * error else "not seen", mean, error


def judge(claim: Claim, values: dict[str, dict[str, float]]) -> tuple[str, float, float, int] | None:
    """Verdict, mean difference, its standard error and the number of seeds, or None if no seed has both rows."""
    better, worse = values.get(claim.better, {}), values.get(claim.worse, {})
    if seeds := sorted(better.keys() & worse.keys()):
        return *verdict([worse[seed] - better[seed] for seed in seeds]), len(seeds)
    return None


def judge_all(claims: list[Claim], lines: list[dict[str, str]], measures: list[str]) -> dict[Claim, list[tuple]]:
    """`judge` of each claim whose rows are there, for each measure; of claims on the same two rows the first alone."""
    judged, values = {}, [by_row(lines, measure) for measure in measures]
    for claim in (claim.on(lines[0]["dataset"]) for claim in claims):
        found = [judge(claim, each) for each in values]
        if found[0] and claim.better != claim.worse:
            judged.setdefault((claim.better, claim.worse), (claim, found))
    return dict(judged.values())


def claims_table(claims: list[Claim], lines: list[dict[str, str]], measures: list[str]) -> str:
    """Markdown: a row for each claim whose rows are there, a cell for each measure, the paper's difference in it.

    Nothing if there is no such claim.
    """
    dataset, paper = lines[0]["dataset"], paper_results()
    titles = [TITLES.get(measure, "Collapsed dimensions") for measure in measures]
    table = [f"| Claim | In the paper | Rows | Seeds | {' | '.join(titles)} |", "|" + "---|" * (4 + len(measures))]
    for claim, found in judge_all(claims, lines, measures).items():
        cells = []
        for measure, (word, mean, error, _) in zip(measures, found, strict=True):
            digits = 5 if measure == ERROR else 2 if measure in KINDS and max(abs(mean), error) < 1 else 1
            cell = f"{word}: {mean:+.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")
            if measure in KINDS and {(dataset, claim.better), (dataset, claim.worse)} <= paper.keys():
                i = KINDS.index(measure)
                theirs = float(paper[dataset, claim.worse][i]) - float(paper[dataset, claim.better][i])
                cell += f" ({theirs:+.1f})"
            cells.append(cell)
        row = [claim.text, claim.place, f"{claim.better} < {claim.worse}", str(found[0][3]), *cells]
        table.append(f"| {' | '.join(row)} |")
    return "\n".join(table) if table[2:] else ""


def tally(claims: list[Claim], lines: list[dict[str, str]]) -> str:
    """Markdown: how many claims have each verdict, and how many would be seen if no two rows differed (Student's t).

    Nothing if no claim has three seeds.
    """
    judged = [found for found in judge_all(claims, lines, list(TITLES)).values() if found[0][3] >= 3]
    table = [f"| Of {len(judged)} claims | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for word in ("seen", "reversed", "not seen"):
        counts = [sum(found[i][0] == word for found in judged) for i in range(len(TITLES))]
        table.append(f"| {word} | {' | '.join(map(str, counts))} |")
    chance = [f"{sum(student.sf(2, found[i][3] - 1) for found in judged):.1f}" for i in range(len(TITLES))]
    table.append(f"| seen by chance, and as many reversed | {' | '.join(chance)} |")
    return "\n".join(table) if judged else ""


def correlations(lines: list[dict[str, str]]) -> str:
    """Markdown: Spearman's rank correlation of our means with the paper's numbers, over rows with three seeds."""
    dataset, paper = lines[0]["dataset"], paper_results()
    table = ["| Rows | Number | Rec. | Sample | Interp. |", "|---|---|---|---|---|"]
    for name, left_out in (("all", lambda label: False), ("without those that the paper calls failures", failure)):
        cells = []
        for i, kind in enumerate(KINDS):
            values = by_row(lines, kind)
            labels = [label for label in values if (dataset, label) in paper and len(values[label]) >= 3]
            labels = [label for label in labels if not left_out(label)]
            ours = [statistics.mean(values[label].values()) for label in labels]
            theirs = [float(paper[dataset, label][i]) for label in labels]
            cells.append(f"{spearmanr(ours, theirs).statistic:.2f}" if len(labels) > 2 else "")
        table.append(f"| {name} | {len(labels)} | {' | '.join(cells)} |")
    return "\n".join(table)


def report(file: Path) -> str:
    """All tables of a study's results. Raises UserError if they are not of one setting."""
    lines = read_results(file)
    if len(settings := {line["setting"] for line in lines}) > 1:
        raise UserError(f"{file} has results of {len(settings)} settings, which are not to be compared: split it")
    parts = ["Difference ± its standard error, positive where the claim holds; in brackets the paper's difference."]
    parts += [claims_table(CLAIMS, lines, list(TITLES)), tally(CLAIMS, lines)]
    parts += [claims_table(COLLAPSE, lines, ["collapsed_dimensions"])]
    if ours := claims_table(OURS, lines, list(TITLES)):
        parts += ["Decisions of ours:", ours]
    if any((lines[0]["dataset"], line["label"]) in paper_results() for line in lines):
        parts += ["Spearman's rank correlation with the paper's numbers:", correlations(lines)]
    return "\n\n".join(part for part in parts if part)


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(prog="paper.claims", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results of paper.study")
    args = parser.parse_args(argv)
    print(report(args.results))


if __name__ == "__main__":
    common.cli(main)
