"""The words of synthetic worlds: films, products and places, each in twelve groups.

All domains have as many groups and words, so that one seed draws the same world in each.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Domain:
    """What items are called.

    Attributes:
      groups: genres of films, kinds of products or places, and ten nouns for the items of each.
      modifiers: words in front of a noun.
      title: template of a title, of `modifier`, `noun` and `year`.
      aspects: what a review speaks of, in the singular.
    """

    groups: Mapping[str, str]
    modifiers: str
    title: str
    aspects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
    """One item: its title, its one or two groups in alphabetical order, the main one of them, and its noun."""

    title: str
    groups: tuple[str, ...]
    main: str
    noun: str


FILMS = Domain(
    {
        "Action": "Strike Pursuit Fury Bullet Chase Vengeance Showdown Ambush Siege Thunder",
        "Animation": "Dragonfly Teapot Moonbeam Puppet Balloon Lantern Squirrel Rainbow Acorn Marble",
        "Comedy": "Wedding Neighbor Vacation Disguise Landlord Rehearsal Mixup Reunion Pajamas Umbrella",
        "Crime": "Alibi Heist Informant Verdict Ledger Syndicate Ransom Suspect Precinct Getaway",
        "Documentary": "Glacier Archive Census Orchard Railway Harvest Migration Reef Workshop Election",
        "Drama": "Father Winter Promise Daughter Silence Confession Inheritance Letter Widow Homecoming",
        "Fantasy": "Dragon Sorcerer Crown Amulet Kingdom Prophecy Unicorn Scepter Oracle Enchantress",
        "Horror": "Cellar Scarecrow Whisper Coffin Ritual Mirror Plague Shadow Asylum Graveyard",
        "Romance": "Serenade Valentine Balcony Embrace Sweetheart Perfume Waltz Moonlight Rose Engagement",
        "Sci-Fi": "Galaxy Android Orbit Nebula Starship Quantum Colony Satellite Clone Singularity",
        "War": "Trench Battalion Convoy Armistice Sniper Regiment Airfield Bunker Frontier Submarine",
        "Western": "Saddle Canyon Outlaw Prairie Sheriff Stagecoach Ranch Desperado Saloon Mustang",
    },
    modifiers="Silent Broken Golden Hidden Last Crimson Distant Wild Frozen Burning Secret Lonely Midnight Forgotten Electric Gentle "
    "Hollow Iron Restless Savage Velvet Wandering Bitter Bright Crooked Endless Fallen Perfect Quiet Stolen Tender Twisted",
    title="The {modifier} {noun} ({year})",
)
PRODUCTS = Domain(
    {
        "Audio": "Headphones Speaker Turntable Microphone Amplifier Earbuds Soundbar Radio Equalizer Mixer",
        "Baby": "Stroller Pacifier Crib Rattle Bib Highchair Playpen Carrier Mobile Nightlight",
        "Camping": "Tent Backpack Hammock Compass Stove Canteen Hatchet Poncho Tarp Headlamp",
        "Cycling": "Helmet Saddlebag Pedal Derailleur Handlebar Pump Mudguard Odometer Jersey Bell",
        "Garden": "Trowel Hose Wheelbarrow Pruner Rake Sprinkler Planter Trellis Shovel Birdhouse",
        "Kitchen": "Kettle Skillet Blender Toaster Whisk Colander Spatula Teapot Grater Ladle",
        "Music": "Guitar Ukulele Violin Harmonica Metronome Capo Tambourine Keyboard Tuner Cymbal",
        "Office": "Stapler Notebook Highlighter Calculator Binder Planner Lamp Shredder Clipboard Whiteboard",
        "Pets": "Leash Aquarium Litterbox Collar Scratcher Kennel Feeder Chew Birdcage Harness",
        "Photography": "Tripod Lens Camera Flash Filter Gimbal Lightbox Viewfinder Backdrop Shutter",
        "Tools": "Hammer Wrench Drill Screwdriver Chisel Clamp Sander Toolbox Level Pliers",
        "Toys": "Puzzle Kite Yoyo Doll Robot Dominoes Slingshot Marionette Blocks Boomerang",
    },
    modifiers="Compact Foldable Stainless Cordless Ergonomic Portable Classic Deluxe Heavy Mini Premium Rugged Slim Smart Universal "
    "Vintage Waterproof Wireless Adjustable Bamboo Ceramic Digital Essential Folding Handmade Insulated Lightweight Magnetic Organic "
    "Padded Reversible Telescopic",
    title="{modifier} {noun}, Model {year}",
    aspects=("price", "design", "finish", "packaging", "size", "manual", "weight", "warranty"),
)
PLACES = Domain(
    {
        "Arts": "Theater Gallery Museum Cinema Playhouse Studio Opera Planetarium Library Bandstand",
        "Bakery": "Bagelry Patisserie Cupcakery Doughnuts Creamery Chocolatier Pretzels Waffles Breadhouse Pies",
        "Bar": "Brewery Taproom Tavern Winery Distillery Pub Lounge Alehouse Speakeasy Cantina",
        "Beauty": "Barber Salon Spa Manicures Tanning Massage Hairdresser Perfumery Sauna Tattoos",
        "Cars": "Carwash Garage Tires Dealership Mufflers Towing Bodyshop Brakes Upholstery Detailing",
        "Coffee": "Espresso Roastery Teahouse Cafe Kiosk Coffeehouse Lattes Drip Percolator Mochas",
        "Fitness": "Gym Yoga Pilates Climbing Boxing Pool Bowling Rowing Judo Dance",
        "Hotel": "Inn Motel Lodge Resort Hostel Cottages Guesthouse Cabins Suites Campground",
        "Outdoors": "Park Trail Beach Lookout Marina Arboretum Playground Falls Meadow Lake",
        "Repair": "Plumber Locksmith Cobbler Tailor Roofing Electrician Upholsterer Watchmaker Glazier Carpenter",
        "Restaurant": "Diner Pizzeria Steakhouse Bistro Taqueria Noodles Grill Buffet Smokehouse Creperie",
        "Shopping": "Bookstore Florist Hardware Antiques Grocer Boutique Jeweler Pharmacy Records Thrift",
    },
    modifiers="Maple Harbor Riverside Sunset Cedar Hilltop Lakeview Prairie Summit Valley Willow Birch Canyon Downtown Eastside Evergreen "
    "Granite Heritage Ivy Juniper Lighthouse Magnolia Northgate Oakwood Pine Plaza Quarry Redwood Station Uptown Westside Windmill",
    title="{modifier} {noun} (since {year})",
    aspects=("service", "price", "atmosphere", "parking", "location", "staff", "music", "view"),
)


def name_items(domain: Domain, count: int, rng: np.random.Generator) -> list[Item]:
    """Name items after their main group; some belong to a second.

    Raises:
      ValueError: more items than there are titles.
    """
    names, modifiers = list(domain.groups), domain.modifiers.split()
    words = {g: [(modifier, noun) for modifier in modifiers for noun in domain.groups[g].split()] for g in names}
    most = sum(map(len, words.values()))
    if count > most:
        raise ValueError(f"{count} items are more than the {most} titles that there are words for.")
    order = {g: rng.permutation(len(words[g])) for g in names}
    items = []
    for i in range(count):
        main = names[i % len(names)]
        modifier, noun = words[main][order[main][i // len(names)]]
        second = names[rng.integers(len(names))] if rng.random() < 0.4 else main
        title = domain.title.format(modifier=modifier, noun=noun, year=rng.integers(1950, 2020))
        items.append(Item(title, tuple(sorted({main, second})), main, noun))
    return items
