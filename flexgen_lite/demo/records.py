"""Endless labelled data-wrangling records: messy contact lines and their normalised JSON.

    Dr. maria  SCHMIDT; born 3 Feb 1987; tel (030) 123 4567 [DE]
    {"name":"Maria Schmidt","born":"1987-02-03","phone":"+49301234567"}

Each line determines its answer: day and month are told apart by the date's form, and the country by a
code in brackets or by an international prefix. Days run from 1 to 28, so that every month has them. The
answer's hash decides the split, so no held-out answer is ever an answer of the training split.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

END_OF_LINE = " =>"
HELD_OUT_SHARE = 1 / 16
MAX_LINE_CHARS = 80


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ada Aisha Alan Amara Ana Anton Bella Boris Carla Cesar Chen Clara Daniel Diego Dora Elena Emil Emma Eva "
    "Felix Fiona Frida Georg Grace Hana Hugo Ida Igor Ines Ivan Jan Jana Joan Jonas Julia Karim Kofi Lara "
    "Leo Lina Louis Lucy Marco Maria Mei Mira Nadia Nils Noor Olga Omar Oscar Paula Pedro Petra Rahel Ravi "
    "Rosa Ruth Sami Sara Simon Sofia Stella Tara Theo Tom Uma Vera Viktor Wanda Yara Yuki Zoe"
)
LAST_NAMES = _words(
    "Adams Ahmed Baker Bauer Becker Berg Blanc Bosch Braun Carter Castro Costa Cruz Dahl Diaz Dubois Evans "
    "Fischer Foster Garcia Gomez Gupta Haas Hansen Hill Hoffman Ito Jansen Jones Kaya Keller Khan Kim Klein "
    "Kowalski Kumar Lang Larsen Lee Lopez Mancini Martin Meyer Moreau Nagy Novak Okafor Olsen Park Patel "
    "Perez Petit Quinn Reyes Rossi Roth Sato Schmidt Silva Singh Smith Suzuki Tanaka Torres Turner Usman "
    "Vidal Vogel Walker Weber Wong Yilmaz Young Zhang Ziegler"
)
ONSETS = _words("b c d f g h j k l m n p r s t v w z br ch dr gr kl kr pr sh st th tr")
VOWELS = _words("a e i o u a e i o ai ei ou")
CODAS = ("", "", "n", "r", "s", "l", "m", "ck", "tt", "ng")
MONTHS = _words("January February March April May June July August September October November December")
TITLES = ("Dr.", "Prof.", "Mr", "Mrs", "Ms")
BIRTH_LABELS = ("born ", "b. ", "* ", "dob ", "DOB: ", "")
PHONE_LABELS = ("tel ", "Tel. ", "ph: ", "T ", "call ", "")
SEPARATORS = ("; ", "; ", " | ", " / ", ", ", ";")


@dataclass(frozen=True)
class Country:
    """How telephone numbers of a country are written: `trunk` is what precedes a national number at home."""

    code: str
    dialling_code: str
    trunk: str


COUNTRIES = (
    Country("DE", "49", "0"),
    Country("FR", "33", "0"),
    Country("GB", "44", "0"),
    Country("NL", "31", "0"),
    Country("SE", "46", "0"),
    Country("CH", "41", "0"),
    Country("ES", "34", ""),
    Country("PL", "48", ""),
    Country("US", "1", ""),
)


@dataclass(frozen=True)
class Record:
    """A messy `line` and the one `answer` that is right for it."""

    line: str
    answer: str


def generate(seed: int, n: int, split: Split = "train") -> list[Record]:
    """Return the first `n` records of the stream that `seed` and `split` name."""
    records = stream(seed, split)
    return [next(records) for _ in range(n)]


def stream(seed: int, split: Split = "train") -> Iterator[Record]:
    """Yield records without end, the same ones for the same `seed` and `split`.

    Raises:
        ValueError: `split` is neither "train" nor "held_out".
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}: it must be 'train' or 'held_out'")
    rng = random.Random(f"{split} {seed}")
    while True:
        record = _draw(rng)
        if len(record.line) <= MAX_LINE_CHARS and split_of(record) == split:
            yield record


def split_of(record: Record) -> Split:
    """Tell which split a record belongs to; it depends on the answer alone."""
    is_held_out = zlib.crc32(record.answer.encode()) < HELD_OUT_SHARE * 2**32
    return "held_out" if is_held_out else "train"


def prompt(record: Record) -> str:
    """Return the text given to the model; the model continues it with the answer and end of sequence."""
    return record.line + END_OF_LINE


def is_correct(record: Record, text: str) -> bool:
    """Tell whether generated `text` is the record's answer, exactly (space around it aside)."""
    return text.strip() == record.answer


def _draw(rng: random.Random) -> Record:
    first, last = _name(rng, FIRST_NAMES), _name(rng, LAST_NAMES)
    year, month, day = rng.randint(1940, 2009), rng.randint(1, 12), rng.randint(1, 28)
    country = rng.choice(COUNTRIES)
    national = rng.choice("123456789") + "".join(rng.choices("0123456789", k=rng.randint(6, 9)))

    separator = rng.choice(SEPARATORS)
    name_field = _messy_name(rng, first, last, may_invert="," not in separator)
    date_field = rng.choice(BIRTH_LABELS) + _messy_date(rng, year, month, day)
    phone_field = rng.choice(PHONE_LABELS) + _messy_phone(rng, country, national)
    fields = [name_field, date_field, phone_field]
    if rng.random() < 0.5:
        rng.shuffle(fields)
    answer = {
        "name": f"{first} {last}",
        "born": f"{year}-{month:02}-{day:02}",
        "phone": f"+{country.dialling_code}{national}",
    }
    return Record(separator.join(fields), json.dumps(answer, separators=(",", ":")))


def _name(rng: random.Random, known: tuple[str, ...]) -> str:
    """Return a known name, or (four times in ten) one made up of syllables."""
    if rng.random() < 0.6:
        return rng.choice(known)
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2)))
    return ("".join(syllables) + rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(CODAS)).capitalize()


def _messy_name(rng: random.Random, first: str, last: str, may_invert: bool) -> str:
    first, last = _any_case(rng, first), _any_case(rng, last)
    if may_invert and rng.random() < 0.25:
        return f"{last}, {first}"
    title = rng.choice(TITLES) + " " if rng.random() < 0.25 else ""
    return title + first + rng.choice((" ", " ", "  ")) + last


def _any_case(rng: random.Random, word: str) -> str:
    change: Callable[[str], str] = rng.choice((str, str, str.lower, str.upper))
    return change(word)


def _messy_date(rng: random.Random, year: int, month: int, day: int) -> str:
    """Write a date so that its form tells day from month."""
    month_name = MONTHS[month - 1] if rng.random() < 0.3 else MONTHS[month - 1][:3]
    month_name = _any_case(rng, month_name)
    day_text = rng.choice((f"{day}", f"{day:02}"))
    month_text = f"{month:02}" if len(day_text) == 2 else f"{month}"
    forms = (
        f"{day_text} {month_name} {year}",
        f"{day_text}-{month_name}-{year}",
        f"{month_name} {day_text}, {year}",
        f"{day_text}.{month_text}.{year}",
        f"{year}-{month:02}-{day:02}",
        f"{year}/{month:02}/{day:02}",
    )
    return rng.choice(forms)


def _messy_phone(rng: random.Random, country: Country, national: str) -> str:
    """Write a number at home, with its country in brackets, or with an international prefix."""
    area_len = rng.randint(2, 3)
    area, local = national[:area_len], national[area_len:]
    local_len = rng.randint(3, len(local)) if len(local) > 3 else len(local)
    mark = rng.choice(" -")
    local = local[:local_len] + mark + local[local_len:] if local_len < len(local) else local
    if rng.random() < 0.4:
        prefix = rng.choice(("+", "+", "00")) + country.dialling_code
        return prefix + rng.choice((f" {area} {local}", f" ({area}) {local}", f" {area}{local}"))
    area = country.trunk + area
    number = rng.choice((f"{area} {local}", f"({area}) {local}", f"{area}/{local}", f"{area}{local}"))
    return rng.choice((f"{number} [{country.code}]", f"{number} ({country.code})", f"[{country.code}] {number}"))
