"""Capitals: factual recall.

    The capital of France is the city of   -> Paris, not Rome

The corrupted prompt has another country with as many tokens, whose capital is the distractor.
"""

from __future__ import annotations

import math
import random

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import pieces

SENTENCES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "The capital of {country} is the city of",
    "We know that the capital of {country} is",
    "Question: What is the capital of {country}? Answer:",
    "Question: Which city is the capital of {country}? Answer:",
    "They flew to the capital of {country}, which is",
    "He has never been to the capital of {country}, the city of",
    "She moved to the capital of {country}, the city of",
    "Country: {country}. Capital:",
    "The country is {country}, and its capital is",
    "The government of {country} meets in its capital,",
)
CAPITALS = {
    "Afghanistan": "Kabul",
    "Albania": "Tirana",
    "Angola": "Luanda",
    "Argentina": "Buenos Aires",
    "Armenia": "Yerevan",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Azerbaijan": "Baku",
    "Bangladesh": "Dhaka",
    "Belarus": "Minsk",
    "Belgium": "Brussels",
    "Botswana": "Gaborone",
    "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh",
    "Cameroon": "Yaoundé",
    "Canada": "Ottawa",
    "Chad": "N'Djamena",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Eritrea": "Asmara",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Georgia": "Tbilisi",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Guinea": "Conakry",
    "Haiti": "Port-au-Prince",
    "Honduras": "Tegucigalpa",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kazakhstan": "Astana",
    "Kenya": "Nairobi",
    "Kyrgyzstan": "Bishkek",
    "Laos": "Vientiane",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Liberia": "Monrovia",
    "Libya": "Tripoli",
    "Lithuania": "Vilnius",
    "Madagascar": "Antananarivo",
    "Malawi": "Lilongwe",
    "Malaysia": "Kuala Lumpur",
    "Mali": "Bamako",
    "Malta": "Valletta",
    "Mauritania": "Nouakchott",
    "Moldova": "Chișinău",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Mozambique": "Maputo",
    "Namibia": "Windhoek",
    "Nepal": "Kathmandu",
    "Nicaragua": "Managua",
    "Niger": "Niamey",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Oman": "Muscat",
    "Pakistan": "Islamabad",
    "Paraguay": "Asunción",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Qatar": "Doha",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Rwanda": "Kigali",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "Somalia": "Mogadishu",
    "Spain": "Madrid",
    "Sudan": "Khartoum",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Syria": "Damascus",
    "Tanzania": "Dodoma",
    "Thailand": "Bangkok",
    "Togo": "Lomé",
    "Tunisia": "Tunis",
    "Turkey": "Ankara",
    "Uganda": "Kampala",
    "Ukraine": "Kyiv",
    "Uruguay": "Montevideo",
    "Uzbekistan": "Tashkent",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
    "Yemen": "Sanaa",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}


@register_recipe("capitals")
def capitals(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError if no two countries can replace each other."""
    partners = exchangeable(tokenizer)
    countries = list(partners)
    sizes = len(SENTENCES), len(countries)

    def make(number: int, generator: random.Random) -> Example:
        sentence, country_index = mixed_radix(number, sizes)
        country = countries[country_index]
        corrupted_country = generator.choice(partners[country])
        return Example(
            f"sentence-{sentence:02}",
            SENTENCES[sentence].format(country=country),
            SENTENCES[sentence].format(country=corrupted_country),
            answer=f" {CAPITALS[country]}",
            distractor=f" {CAPITALS[corrupted_country]}",
        )

    return Recipe(math.prod(sizes), make, f"{len(countries)} countries can be exchanged for others")


def exchangeable(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Countries, each with those of as many tokens whose capital differs before either ends."""
    written = pieces(tokenizer, CAPITALS)
    cities = pieces(tokenizer, CAPITALS.values())
    countries = [c for c in CAPITALS if c in written and CAPITALS[c] in cities]
    partners = {
        country: [
            candidate
            for candidate in countries
            if len(written[candidate]) == len(written[country])
            and any(
                a != b
                for a, b in zip(*(cities[CAPITALS[c]] for c in (country, candidate)), strict=False)
            )
        ]
        for country in countries
    }
    partners = {country: candidates for country, candidates in partners.items() if candidates}
    if not partners:
        raise ValueError("capitals: this tokenizer writes no two countries in as many tokens.")
    return partners
