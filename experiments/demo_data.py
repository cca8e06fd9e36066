"""Makes the demo's data set: sentences about invented games and their meaning representations, in ViGGO's format.

    python experiments/demo_data.py --output DIR    writes DIR/train.csv and DIR/test.csv with the columns mr and ref

Every row is drawn from templates that were written for this project. No sentence occurs twice, so no test row is a
training row.
"""
import argparse
import csv
import random
from pathlib import Path

FIRST = "Amber Broken Cobalt Distant Ember Frozen Golden Hollow Iron Jade Lunar Misty Northern Opal Painted".split()
SECOND = "Archive Bastion Circuit Dynasty Engine Frontier Garden Harbor Island Junction Kingdom Lantern Meadow".split()
GENRES = ["puzzle", "racing", "strategy", "role-playing", "simulation", "shooter", "platformer", "adventure"]
PLATFORMS = ["PC", "PlayStation", "Xbox", "Nintendo Switch"]
STUDIOS = ["Alder Works", "Bluefin", "Cinderpath", "Doubledoor", "Elmtree Games", "Farlight"]
VIEWS = ["first person", "third person", "bird view", "side view"]
RATINGS = {"excellent": ["a masterpiece", "truly excellent"], "good": ["quite good", "pretty fun"],
           "average": ["just okay", "nothing special"], "poor": ["rather bad", "a letdown"]}


def listing(words: list[str]) -> str:
    """The words as a list in a sentence: "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def draw_attribute(rng: random.Random, kind: str) -> tuple[str, str]:
    """(a value for the meaning representation, a phrase that says it and can follow "It")."""
    if kind == "genres":
        value = rng.sample(GENRES, rng.choice([1, 1, 2]))
        return ", ".join(value), rng.choice(["is a {} game", "belongs to the {} genre"]).format(listing(value))
    if kind == "platforms":
        value = rng.sample(PLATFORMS, rng.choice([1, 2, 3]))
        return ", ".join(value), rng.choice(["runs on {}", "is out for {}", "can be played on {}"]).format(
            listing(value))
    if kind == "release_year":
        value = str(rng.randrange(1998, 2022))
        return value, rng.choice(["came out in {}", "was released in {}"]).format(value)
    if kind == "developer":
        value = rng.choice(STUDIOS)
        return value, rng.choice(["was made by {}", "comes from the studio {}"]).format(value)
    if kind == "player_perspective":
        value = rng.choice(VIEWS)
        return value, rng.choice(["is played in {}", "shows the action in {}"]).format(value)
    if kind == "has_multiplayer":
        value = rng.choice(["yes", "no"])
        return value, {"yes": rng.choice(["has a multiplayer mode", "lets friends join in"]),
                       "no": rng.choice(["is for one player only", "has no multiplayer mode"])}[value]
    value = rng.choice(list(RATINGS))
    return value, "is " + rng.choice(RATINGS[value])


def draw_row(rng: random.Random) -> tuple[str, str]:
    """(a meaning representation, a sentence that says it)."""
    kinds = ["genres", "platforms", "release_year", "developer", "player_perspective", "has_multiplayer", "rating"]
    function = rng.choice(["inform", "inform", "recommend", "verify_attribute", "give_opinion", "request_explanation"])
    name = f"{rng.choice(FIRST)} {rng.choice(SECOND)}"
    chosen = rng.sample(kinds, rng.randrange(2, 5) if function == "inform" else rng.randrange(1, 3))
    drawn = {kind: draw_attribute(rng, kind) for kind in chosen}
    phrases = [phrase for _, phrase in drawn.values()]
    said = listing(phrases)
    sentence = {
        "inform": [f"{name} {said}.", f"There is a game called {name}. It {said}."],
        "recommend": [f"Since you like a game that {said}, have you tried {name}?",
                      f"You should try {name}, it {said}."],
        "verify_attribute": [f"You told me that {name} {said}. Is that still how you see it?",
                             f"Did you not say that {name} {said}?"],
        "give_opinion": [f"I played {name} and I have to say it {said}.", f"If you ask me, {name} {said}."],
        "request_explanation": [f"Why do you care that {name} {said}?",
                                f"What is it about {name} that makes you say it {said}?"],
    }[function]
    order = ["name", *(k for k in kinds if k in drawn)]
    values = {"name": name, **{kind: value for kind, (value, _) in drawn.items()}}
    return f"{function}({', '.join(f'{k}[{values[k]}]' for k in order)})", rng.choice(sentence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the folder for train.csv and test.csv")
    parser.add_argument("--train_rows", type=int, default=4000)
    parser.add_argument("--test_rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    rng, rows = random.Random(args.seed), {}
    while len(rows) < args.train_rows + args.test_rows:
        mr, sentence = draw_row(rng)
        rows[sentence] = mr
    rows = list(rows.items())
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[args.test_rows:]), ("test", rows[:args.test_rows])):
        with open(Path(args.output) / f"{split}.csv", "w", newline="") as f:
            csv.writer(f).writerows([("mr", "ref"), *((mr, sentence) for sentence, mr in part)])
        print(f"{len(part)} rows in {args.output}/{split}.csv")


if __name__ == "__main__":
    main()
