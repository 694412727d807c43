"""What the paper claims and what a study saw: ratios of two rows with intervals, and rank correlations, in Markdown.

    python -m paper.claims paper/results/fashion_mnist.csv                       # all parts
    python -m paper.claims paper/results/fashion_mnist.csv --part verdicts       # one of them

Differences of two rows in % of the second (of collapsed dimensions as they are), reconstruction / sample /
interpolation, beside those of the paper's FIDs: the mean of the logarithms of the ratios by seed and its 95 % interval
of Student's t. *Seen*: the interval leaves 0 out on the paper's side, be that a gain or a loss; *opposite*: on the
other; *smaller*: it holds 0 but nothing as large as the paper's difference; else *cannot tell*. Below SMALL % in the
paper: *too small* to be judged. FD-Lite0 and the error (by the paper's FID of reconstructions) decide, on the digits
FDC (by the paper's Fashion-MNIST); elsewhere FDC is a check. **Bold**: left by Benjamini and Hochberg's procedure at
5 % over all comparisons of the file that decide and have a verdict. Decisions are ours, and a control: not judged.
"""

import itertools
import math
import re
import statistics
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from scipy.stats import false_discovery_control, spearmanr
from scipy.stats import t as student

import common
import harness
from common import UserError
from fid import KINDS
from paper.study import study_rows
from paper.table import dataset_of, markdown, metrics_of, paper_results, read_results, row_name

ERROR, COLLAPSED, CHECK = "validation_mse", "collapsed_dimensions", "FDC"
LIKE = {"digits": "fashion_mnist"}  # whose numbers of the paper stand for those of a data set without any
SMALL = 8  # per cent: IWAE 1x and VAE 1x are one objective, and the paper's FIDs of them differ by up to so much

# Pairs of rows "ours | other", {k} being 2, 4 and 8; labels that do not say which sigma points have those of the paper
# for the data set. The first pair of a main claim stands for it in the summary.
HEADLINE = {
    "UT-VAE against VAE: sigma points and the mean image, KL": "UT-VAE {k}x | VAE {k}x",
    "UT-VAE* against VAE*: the same under W₂": "UT-VAE* {k}x | VAE* {k}x",
    "VAE* against VAE: W₂ for KL": "VAE* {k}x | VAE {k}x, VAE* 1x | VAE 1x, UT-VAE* {k}x | UT-VAE {k}x",
    "UAE against VAE": "UAE {k}x | VAE {k}x",
    "UAE against UT-VAE*: the penalty": "UAE {k}x | UT-VAE* {k}x",
    "UAE against RAE-L2": "UAE {k}x | RAE-L2",
    "The mean image against each image's error, K = 2": "UT-VAE 2x | UT-VAE† 2x, VAE† 2x | VAE 2x",
    "8 points against 2": "UT-VAE 8x | UT-VAE 2x, UT-VAE* 8x | UT-VAE* 2x, UAE 8x | UAE 2x",
}
COLLAPSE = {"Collapsed dimensions, W₂ against KL": HEADLINE["VAE* against VAE: W₂ for KL"]}
COLLAPSING = "UT-VAE 2x | UT-VAE* 2x | UT-VAE*² 2x"  # whose dimensions the summary counts
COLLAPSE_ROW = "Collapsed dimensions of {}, UT-VAE, K = 2: KL / W₂ / its square"
OTHERS = {
    "RAE against the VAE (Table 2)": "RAE-no-reg | VAE {k}x",
    "VAE* against the RAE (Table 2)": "VAE* {k}x | RAE-no-reg",
    "UAE against RAE-GP (Table 2)": "UAE {k}x | RAE-GP",
    "UAE against the UT-VAE (Table 2)": "UAE {k}x | UT-VAE {k}x",
    "Decoder regularisation, RAE (Table 2)": "RAE-GP | RAE-no-reg, RAE-L2 | RAE-no-reg, RAE-SN | RAE-no-reg",
    "Sigma points alone (Table 3)": "UT-VAE 2x | VAE† 2x, UT-VAE† 2x | VAE 2x",
    "Random points against random pairs, KL (Table 5)": "UT-VAE {k}x random | UT-VAE {k}x pairs",
    "Random points against random pairs, W₂ (Table 5)": "UT-VAE* {k}x random | UT-VAE* {k}x pairs",
    "Random points against the largest axes, KL (Table 5)": "UT-VAE {k}x random | UT-VAE {k}x largest",
    "Random points against the largest axes, W₂ (Table 5)": "UT-VAE* {k}x random | UT-VAE* {k}x largest",
    "More samples (Table 6)": "VAE 8x | VAE 1x, VAE* 8x | VAE* 1x, IWAE 8x | IWAE 1x",
    "IWAE against the VAE (Table 6)": "IWAE {k}x | VAE {k}x",
    "W₂ against IWAE (Table 6)": "VAE* {k}x | IWAE {k}x, UAE {k}x | IWAE {k}x",
    "Decoder regularisation (Table 8)": "VAE-GP 2x | VAE 2x, UT-VAE-GP 2x | UT-VAE 2x, VAE*-GP 2x | VAE* 2x",
    "Sigma points and the mean image, GP (Table 8)": "UT-VAE-GP 2x | VAE-GP 2x, UAE 2x | VAE*-GP 2x",
    "W₂ beats KL, GP (Table 8)": "VAE*-GP 2x | VAE-GP 2x, UAE 2x | UT-VAE-GP 2x",
    "Full covariance, KL (Table 9)": "VAE-full 2x | VAE 2x, UT-VAE-full 2x | UT-VAE 2x",
    "Full covariance, KL, GP (Table 9)": "VAE-full-GP 2x | VAE-GP 2x, UT-VAE-full-GP 2x | UT-VAE-GP 2x",
    "Full covariance, W₂ (Table 9)": "VAE*-full 2x | VAE* 2x, UT-VAE*-full 2x | UT-VAE* 2x",
    "Full covariance, W₂, GP (Table 9)": "VAE*-full-GP 2x | VAE*-GP 2x, UT-VAE*-full-GP 2x | UAE 2x",
    "VAE* against WAE-MMD (Table 10)": "VAE* 1x | WAE-MMD",
}
DECISIONS = {  # not the paper's: our way, and another, of what it leaves open; and one objective twice
    "W₂ against its square": "VAE* 2x | VAE*² 2x, UT-VAE* 2x | UT-VAE*² 2x, UAE 2x | UAE² 2x",
    "W₂ against two norms": "UT-VAE* 2x | UT-VAE*ⁿ 2x",
    "Linear schedule against plateau": "VAE 2x | VAE 2x plateau, UT-VAE* 2x | UT-VAE* 2x plateau",
    "Control: the same objective": "IWAE 1x | VAE 1x",
}
CLAIMS = {"headline": HEADLINE, "collapse": COLLAPSE, "others": OTHERS, "decisions": DECISIONS}
PARTS = ["summary", *CLAIMS, "verdicts", "correlations", "check"]
VERDICTS = ["seen", "opposite", "smaller", "cannot tell", "too small"]  # all but the last are judged


class Comparison(NamedTuple):
    """Two rows in one measure: the logarithm of their ratio or, of counts, their difference; the paper's (None: it has
    none), the mean of ours over `seeds`, half its 95 % interval and its p-value. `left`: by Benjamini and Hochberg."""

    part: str
    claim: str
    pair: tuple[str, ...]
    measure: str
    paper: float | None
    mean: float
    half: float
    p: float
    seeds: int
    left: bool = False

    @property
    def verdict(self) -> str:
        if self.seeds == 1 or self.part == "decisions":
            return ""
        if self.measure != COLLAPSED and abs(100 * math.expm1(self.paper)) < SMALL:
            return "too small"
        side = math.copysign(1, self.paper)
        if abs(self.mean) > self.half:
            return "seen" if side * self.mean > 0 else "opposite"
        return "smaller" if side * self.mean + self.half < abs(self.paper) else "cannot tell"

    @property
    def cell(self) -> str:
        show = "{:+.1f}".format if self.measure == COLLAPSED else percent
        text = show(self.mean)
        if self.seeds > 1:
            text += f" ({show(self.mean - self.half)} to {show(self.mean + self.half)})"
        return f"**{text}**" if self.left else text


def percent(log: float) -> str:
    """The logarithm of a ratio as a difference in %, with a decimal below 10."""
    share = 100 * math.expm1(log)
    return f"{share:+.1f}" if abs(share) < 9.95 else f"{share:+.0f}"


def values_by_row(lines: list[dict[str, str]], column: str) -> dict[str, dict[int, float]]:
    """The values of a column by row and seed, of runs that did not fail."""
    values = {}
    for line in sorted(lines, key=lambda line: int(line["seed"])):
        if not line["error"] and line.get(column):
            values.setdefault(row_name(line), {})[int(line["seed"])] = float(line[column])
    return values


def columns_of(lines: list[dict[str, str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By name, the columns that decide, distances and the error; and those of a distance that is a check alone."""
    groups = {metric: [f"{metric}_{kind}" for kind in KINDS] for metric in metrics_of(lines[0])}
    checks = {CHECK: groups.pop(CHECK)} if CHECK in groups and len(groups) > 1 else {}
    return groups | {"Error (MSE)": [ERROR]}, checks


def paper_numbers(dataset: str, label: str) -> list[float]:
    """The paper's three FIDs of a row, or none."""
    return [float(number) for number in paper_results().get((LIKE.get(dataset, dataset), label), ())]


def paper_ratios(dataset: str, pair: tuple[str, ...]) -> list[float]:
    """The logarithms of the three ratios of two rows in the paper, or none."""
    ours, other = (paper_numbers(dataset, label) for label in pair)
    return [math.log(a / b) for a, b in zip(ours, other, strict=False)]


def pairs(text: str, dataset: str, ks: tuple = (2, 4, 8)) -> list[tuple[str, ...]]:
    """The pairs of a claim, with the labels that their rows have on a data set."""
    found, points = [], common.DEFAULTS[dataset]["sigma_points"]
    unnamed = rf"^((?:UT-VAE|UAE)\S* \dx)(?! (?:{'|'.join(common.HEURISTICS)}))"
    for pair in text.split(", "):
        for k in ks if "{k}" in pair else (0,):
            found.append(tuple(re.sub(unnamed, rf"\1 {points}", label.format(k=k)) for label in pair.split(" | ")))
    return found


def compare(ours: dict[int, float], other: dict[int, float], counts: bool = False) -> tuple | None:
    """Of the logarithms of the ratios by seed (of counts, of the differences): mean, half its 95 % interval and its
    p-value (Student's t), and how many seeds both have. None without any."""
    seeds = ours.keys() & other.keys()
    if not seeds:
        return None
    found = [ours[seed] - other[seed] if counts else math.log(ours[seed] / other[seed]) for seed in seeds]
    mean, freedom = statistics.mean(found), len(seeds) - 1
    if not freedom:
        return mean, math.inf, math.nan, 1
    error = statistics.stdev(found) / len(seeds) ** 0.5
    p = 2 * student.sf(abs(mean) / error, freedom) if error else float(mean == 0)
    return mean, student.ppf(0.975, freedom) * error, p, len(seeds)


def judge(lines: list[dict[str, str]], dataset: str) -> list[Comparison]:
    """All comparisons whose rows were run, by claim and pair, and which are left of those that decide."""
    found, over_half = [], common.DEFAULTS[dataset]["latent_dim"] / -2  # fewer dimensions, in Appendix H
    groups, checks = columns_of(lines)
    for part, (claim, text) in ((part, item) for part, claims in CLAIMS.items() for item in claims.items()):
        columns = [COLLAPSED] if part == "collapse" else list(itertools.chain(*groups.values(), *checks.values()))
        values = {column: values_by_row(lines, column) for column in columns}
        for pair, column in itertools.product(pairs(text, dataset), columns):
            kind = column.rpartition("_")[2]
            ratios = [over_half] if part == "collapse" else paper_ratios(dataset, pair)
            theirs = ratios[KINDS.index(kind) if kind in KINDS else 0] if ratios else None
            ours = compare(*(values[column].get(label, {}) for label in pair), counts=part == "collapse")
            found += [Comparison(part, claim, pair, column, theirs, *ours)] if ours else []
    deciding = [each.verdict in VERDICTS[:-1] and each.measure not in checks.get(CHECK, ()) for each in found]
    judged = list(itertools.compress(range(len(found)), deciding))
    left = false_discovery_control([found[i].p for i in judged]) <= 0.05 if judged else []
    for i in itertools.compress(judged, left):
        found[i] = found[i]._replace(left=True)
    return found


def table_of(header: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that have no cell."""
    used = [i for i in range(len(header)) if not rows or any(row[i] for row in rows)]
    return markdown([header[i] for i in used], [[row[i] for i in used] for row in rows])


def claims_table(found: list[Comparison], groups: dict[str, list[str]], dataset: str) -> str:
    """A row for each pair, with the measures of `groups`; a claim is named in its first."""
    rows, last = [], ""
    found = [each for each in found if any(each.measure in columns for columns in groups.values())]
    for (claim, pair), here in itertools.groupby(found, lambda each: (each.claim, each.pair)):
        here = list(here)
        cells = [" / ".join(each.cell for each in here if each.measure in columns) for columns in groups.values()]
        theirs = "" if here[0].part == "collapse" else " / ".join(map(percent, paper_ratios(dataset, pair)))
        counted = Counter(each.verdict for each in here)
        words = ", ".join(f"{counted[verdict]} {verdict}" for verdict in VERDICTS if counted[verdict])
        names = " / ".join(pair).replace(f" {common.DEFAULTS[dataset]['sigma_points']}", "")
        rows.append([claim if claim != last else "", names, str(here[0].seeds), theirs, *cells, words])
        last = claim
    return table_of(["Claim", "Rows", "Seeds", "The paper", *groups, "Verdicts"], rows)


def word(found: list[Comparison]) -> str:
    """What the summary says of two rows, from the comparisons that decide it."""
    left = {each.verdict for each in found if each.left}
    if all(each.verdict == "too small" for each in found):
        return "too small to test" if found else "–"
    return {"seen": "yes", "opposite": "opposite"}[left.pop()] if len(left) == 1 else "cannot tell"


def summary(lines: list[dict[str, str]], dataset: str, every: list[Comparison], full: list[dict[str, str]]) -> str:
    """The first pair of each main claim, reconstructions, K = 2 / 8, and what collapses; full: lines of full width."""
    metric, (distance, *_) = next(iter(columns_of(lines)[0].items()))
    rows, wide = [], values_by_row(full, distance)
    for claim, text in HEADLINE.items():
        two = pairs(text.split(", ")[0], dataset, (2, 8))
        found = [each for each in every if each.claim == claim and each.measure in (distance, ERROR)]
        here = [[each for each in found if each.pair == pair] for pair in two]
        if any(here):
            theirs = " / ".join(percent(paper_ratios(dataset, pair)[0]) for pair in two)
            cells = [" / ".join(group[i].cell if group else "–" for group in here) for i in (0, 1)]
            ratio = compare(*(wide.get(label, {}) for label in two[-1]))
            at_full = f"{Comparison('', '', two[-1], distance, None, *ratio).cell}; {ratio[-1]}" if ratio else ""
            rows.append([claim, theirs, *cells, at_full, " / ".join(dict.fromkeys(map(word, here)))])
    if means := {label: statistics.mean(each.values()) for label, each in values_by_row(lines, COLLAPSED).items()}:
        (labels,) = pairs(COLLAPSING, dataset)
        counts = " / ".join(f"{means[label]:.0f}" if label in means else "–" for label in labels)
        here = [each for each in every if each.measure == COLLAPSED and each.pair == labels[1::-1]]
        counts = f"**{counts}**" if any(each.left for each in here) else counts
        row = COLLAPSE_ROW.format(common.DEFAULTS[dataset]["latent_dim"])
        rows.append([row, "over half / none (Fig. 5)", counts, "", "", word(here)])
    ours = f"Here ({metric})", "Here (error)", "Full width, K = 8; seeds"
    return table_of(["A against B", "The paper (FID)", *ours, "As in the paper?"], rows)


def verdicts(found: list[Comparison], checks: list[str]) -> str:
    """How many comparisons have each verdict, by measure and of all that decide, and how many of them are left; of how
    many half the interval is more than the paper's difference."""
    rows, judged = [], [each for each in found if each.seeds > 1]
    for name in [*dict.fromkeys(each.measure for each in judged), "all that decide"]:
        here = [each for each in judged if each.measure == name or (name[:3] == "all" and each.measure not in checks)]
        counted, left = Counter(each.verdict for each in here), Counter(each.verdict for each in here if each.left)
        numbers = [len(here), *(counted[verdict] for verdict in VERDICTS), left["seen"], left["opposite"]]
        numbers += [sum(each.half > abs(each.paper) for each in here)]
        title = name.replace(ERROR, "error").replace("_", " ") + (" (a check)" if name in checks else "")
        rows.append([title, *map(str, numbers)])
    counts = ["Comparisons", *map(str.capitalize, VERDICTS), "**Seen**", "**Opposite**"]
    return markdown(["Measure", *counts, "Wider than the paper's difference"], rows)


@cache
def main_rows(dataset: str) -> list[str]:
    """The labels of the rows that the study runs first and the paper has."""
    return [row.label for row in study_rows(dataset) if row.headline and paper_numbers(dataset, row.label)]


def rank_correlation(values: dict[str, dict[int, float]], dataset: str, kind: str, labels: list[str]) -> float:
    """Spearman's of rows' means over seeds with the paper's FID of a kind of images; nan below three rows."""
    ours = [statistics.mean(values[label].values()) for label in labels]
    theirs = [paper_numbers(dataset, label)[KINDS.index(kind)] for label in labels]
    return spearmanr(ours, theirs)[0] if len(labels) > 2 else math.nan


def correlations(lines: list[dict[str, str]], dataset: str) -> str:
    """Rank correlations with the paper's FID over rows with two seeds; the error's with that of reconstructions."""
    seeds, rows = values_by_row(lines, ERROR), []
    known = [label for label, each in seeds.items() if len(each) > 1 and paper_numbers(dataset, label)]
    groups = {"main rows": [label for label in known if label in main_rows(dataset)], "rows": known}
    groups["rows without KL"] = [label for label in known if re.search(r"\*|^(RAE|UAE|WAE)", label)]
    measures = {name: [(values_by_row(lines, column), kind) for column, kind in zip(columns, KINDS, strict=False)]
                for name, columns in columns_of(lines)[0].items()}  # fmt: skip
    for name, labels in groups.items():
        cells = [
            [rank_correlation(values, dataset, kind, labels) for values, kind in each] for each in measures.values()
        ]
        rows.append([f"{len(labels)} {name}", *(" / ".join(f"{r:.2f}" for r in cell) for cell in cells)])
    return markdown(["Rank correlation over", *measures], rows)


def report(file: Path, wanted: str | None = None, full: Path | None = None) -> str:
    """The parts of a study's results, or one of them; full: results at full width, for the summary."""
    (setting, lines), (wide, wide_lines) = read_results(file), read_results(full) if full else ("", [])
    dataset, (groups, checks) = dataset_of(setting), columns_of(lines)
    if full and dataset_of(wide) != dataset:
        raise UserError(f"--full {full} is of {dataset_of(wide)}, {file} of {dataset}")
    every = judge(lines, dataset)
    claims = [each for each in every if each.part != "decisions"]
    parts = {"summary": summary(lines, dataset, every, wide_lines)}
    for part in CLAIMS:
        shown = {"Collapsed dimensions": [COLLAPSED]} if part == "collapse" else groups
        parts[part] = claims_table([each for each in every if each.part == part], shown, dataset)
    parts["verdicts"] = verdicts(claims, checks.get(CHECK, []))
    if lost := [f"{line['label']}, seed {line['seed']}" for line in lines if line["error"]]:
        parts["verdicts"] += f"\n\nFailed, in no comparison: {'; '.join(lost)}."
    parts["correlations"] = correlations(lines, dataset)
    parts["check"] = claims_table(claims, checks, dataset)
    printed = [__doc__.rpartition("\n\n")[2].strip(), *(f"**{part.capitalize()}**\n\n{parts[part]}" for part in PARTS)]
    return parts[wanted] if wanted else "\n\n".join(printed)


def main(argv: list[str] | None = None) -> None:
    parser = harness.Parser("paper.claims", __doc__)
    parser.add_argument("results", type=Path, help="results of paper.study")
    parser.add_argument("--full", type=Path, metavar="RESULTS", help="results at full width, for the summary")
    parser.add_argument("--part", choices=PARTS, help="print this part alone")
    args = parser.parse_args(argv)
    print(report(args.results, args.part, args.full))


if __name__ == "__main__":
    harness.cli(main)
