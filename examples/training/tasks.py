"""Five small tasks with exactly scorable answers. Each is a generator of (user message, answer) pairs from a seeded Random.

`examples(task, split, count)` gives the data: the same call always gives the same items, no prompt comes twice, and no
prompt of the test split is in the train split. Names and numbers are invented.
"""
import random
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Callable


NUM_HELD_OUT = 200


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    system: str
    generate: Callable[[random.Random], tuple[str, str]]
    max_tokens: int  # enough for every answer and its end-of-turn token


def examples(task, split, count):
    """[{"messages": [system, user], "answer": str}], `count` of them. The test split is drawn first and left out of train."""
    chosen = draw(task, "test", NUM_HELD_OUT, taken=set())
    if split == "train":
        chosen = draw(task, "train", count, taken={prompt for prompt, _ in chosen})
    return [{"messages": [{"role": "system", "content": task.system}, {"role": "user", "content": prompt}], "answer": answer}
            for prompt, answer in chosen[:count]]


def draw(task, split, count, taken):
    """`count` pairs with different prompts, none of them in `taken`."""
    rng, seen, chosen = random.Random(f"{task.name}/{split}"), set(taken), []
    while len(chosen) < count:
        prompt, answer = task.generate(rng)
        if prompt not in seen:
            seen.add(prompt)
            chosen.append((prompt, answer))
    return chosen


# dates: one date, written in one of many ways, to ISO 8601. Slashes mean month first, dots mean day first.

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def ordinal(n):
    return f"{n}{'th' if 11 <= n % 100 <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def dates(rng):
    day = date(1950, 1, 1) + timedelta(days=rng.randrange(29220))
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    written = rng.choice([
        f"{month} {day.day}, {day.year}",
        f"{month} {ordinal(day.day)}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"the {ordinal(day.day)} of {month} {day.year}",
        f"{month[:3]} {day.day} {day.year}",
        f"{day.day:02d}-{month[:3]}-{day.year}",
        f"{day.day}{month[:3].upper()}{day.year}",
        f"{weekday}, {day.day} {month} {day.year}",
        f"{weekday[:3]} {month[:3]} {day.day} {day.year}",
        f"{day.month:02d}/{day.day:02d}/{day.year}",
        f"{day.month}/{day.day}/{day.year}",
        f"{day.day:02d}.{day.month:02d}.{day.year}",
        f"{day.day}.{day.month}.{day.year}",
        f"{day.year}/{day.month:02d}/{day.day:02d}",
        f"{day.year} {month} {day.day}",
    ])
    sentence = rng.choice(["{}", "{}", "Due {}", "Invoice of {}", "She was born on {}.", "Signed on {} in Lyon.", "The talk is on {}.", "Valid until {}"])
    return sentence.format(written), day.isoformat()


# sql: a question about two tables that the system message states. Every template has many fillings: with few of them, all
# would be held out and none left to learn from.

CITIES = ["Oslo", "Lima", "Cairo", "Porto", "Delhi", "Quito", "Turin", "Dakar", "Hanoi", "Perth"]
ITEMS = ["lamp", "desk", "chair", "mug", "clock", "phone", "shelf", "sofa", "pen", "rug"]


def sql(rng):
    city, item = rng.choice(CITIES), rng.choice(ITEMS)
    age, price, limit = rng.randrange(18, 80), rng.randrange(5, 500), rng.randrange(2, 10)
    user, where = rng.choice([
        (f"users in {city}", f" WHERE city = '{city}'"),
        (f"users from {city}", f" WHERE city = '{city}'"),
        (f"users older than {age}", f" WHERE age > {age}"),
        (f"users younger than {age}", f" WHERE age < {age}"),
        (f"users in {city} older than {age}", f" WHERE city = '{city}' AND age > {age}"),
        (f"users not in {city}", f" WHERE city <> '{city}'"),
    ])
    order, order_where = rng.choice([
        (f"{item} orders", f" WHERE item = '{item}'"),
        (f"orders above {price}", f" WHERE price > {price}"),
        (f"orders below {price}", f" WHERE price < {price}"),
        (f"{item} orders above {price}", f" WHERE item = '{item}' AND price > {price}"),
    ])
    question, query = rng.choice([
        (f"How many {user} are there?", f"SELECT COUNT(*) FROM users{where}"),
        (f"Count the {user}.", f"SELECT COUNT(*) FROM users{where}"),
        (f"Names of {user}", f"SELECT name FROM users{where}"),
        (f"List the names of all {user}, oldest first.", f"SELECT name FROM users{where} ORDER BY age DESC"),
        (f"Who are the {limit} youngest {user}?", f"SELECT name FROM users{where} ORDER BY age LIMIT {limit}"),
        (f"What is the average age of {user}?", f"SELECT AVG(age) FROM users{where}"),
        (f"How many {user} per city?", f"SELECT city, COUNT(*) FROM users{where} GROUP BY city"),
        (f"How many {order} do we have?", f"SELECT COUNT(*) FROM orders{order_where}"),
        (f"What is the total price of {order}?", f"SELECT SUM(price) FROM orders{order_where}"),
        (f"The {limit} most expensive {order}", f"SELECT * FROM orders{order_where} ORDER BY price DESC LIMIT {limit}"),
        (f"What is the cheapest price among {order}?", f"SELECT MIN(price) FROM orders{order_where}"),
        (f"Total price per item of {order}", f"SELECT item, SUM(price) FROM orders{order_where} GROUP BY item"),
        (f"Who placed {order}?", f"SELECT name FROM users JOIN orders ON user_id = users.id{order_where}"),
        (f"Which cities have {order}?", f"SELECT DISTINCT city FROM users JOIN orders ON user_id = users.id{order_where}"),
    ])
    return question, query


# contacts: who wrote, as JSON with three fields; what the text does not give is null.

FIRST_NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Laura", "Mark", "Nina", "Oscar", "Paula", "Simon", "Tina", "Victor"]
LAST_NAMES = ["Adams", "Baker", "Clark", "Davis", "Evans", "Foster", "Green", "Hall", "King", "Lewis", "Moore", "Parker", "Reed", "Scott", "Turner", "Ward", "Wood", "Young"]
FIRMS = ["delta", "north", "bright", "river", "summit", "orange", "metro", "garden", "solar", "urban"]


def contacts(rng):
    first, last, firm = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES), rng.choice(FIRMS)
    end = rng.choice(["com", "org", "net"])
    email = rng.choice([f"{first}@{firm}.{end}", f"{last}@{firm}.{end}", f"{first[0]}{last}@{firm}.{end}", f"info@{firm}.{end}"]).lower()
    phone = rng.choice([f"555-{rng.randrange(10000):04d}", f"{rng.randrange(100, 1000)} {rng.randrange(1000, 10000)}"])
    name = f"{first} {last}"
    text = rng.choice([
        f"Hi, {name} here, call me at {phone} or write to {email}.",
        f"Please add {name} ({email}, {phone}) to the list.",
        f"My name is {name}. Mail: {email}. Phone: {phone}.",
        f"{name}, {firm.title()} Ltd, {phone}, {email}",
        f"Reach me on {phone}, mail {email}. Best, {name}",
        f"From: {name} <{email}>\nSubject: offer\n\nMy number is {phone}.",
        f"New lead today: {email}, the person is called {name}, tel {phone}.",
    ]) if rng.random() < 0.6 else None
    if text is None:
        text, has_email, has_phone = rng.choice([
            (f"It was nice to meet you! Just mail {email}. {name}", True, False),
            (f"{name} from {firm.title()} can be reached at {email}.", True, False),
            (f"From: {name} <{email}>\nSubject: hello\n\nSee you on Monday.", True, False),
            (f"Call {name} back on {phone}.", False, True),
            (f"{name} of {firm.title()} rang, number {phone}.", False, True),
            (f"I have no mail, but my phone is {phone}. {name}", False, True),
            (f"{name} came by and left no details.", False, False),
        ])
        email, phone = email if has_email else None, phone if has_phone else None
    quoted = lambda value: f'"{value}"' if value else "null"  # noqa: E731
    return text, f'{{"name":{quoted(name)},"email":{quoted(email)},"phone":{quoted(phone)}}}'


# triage: a support ticket to queue/priority. What the ticket is about gives the queue, how it is said the priority.

ABOUT = {
    "billing": ["I was charged twice for my {plan} plan.", "The invoice for {month} shows the wrong amount.", "My refund from {month} has not arrived.", "Which card is my {plan} plan paid with?",
                "The {month} receipt lists a tax number that is not ours.", "Can we pay the {plan} plan once a year?"],
    "login": ["I cannot sign in since {day}.", "The password reset mail never arrives.", "My account is locked after three attempts on {day}.", "The code for two-step sign-in is refused.",
              "Single sign-on sends me back to the start page.", "I lost the phone with my sign-in codes on {day}."],
    "delivery": ["My parcel from {day} has not arrived.", "The courier left the box at the wrong door on {day}.", "Tracking has shown no news since {day}.", "The package came with a broken {item}.",
                 "Can you send the {item} to another address?", "Half of my order is missing, there was only a {item}."],
    "bug": ["The export button does nothing in the {plan} version.", "The page goes blank when I open the {month} report.", "Search returns an error since {day}.", "The app crashes when I upload a photo of a {item}.",
            "Totals in the {month} report are added up wrongly.", "Every click on save shows an error on {day}."],
    "feature": ["Could you add a dark theme?", "It would be useful to sort the list by {month}.", "We would like an export to Excel in the {plan} plan.", "Please support a second language in the {plan} plan.",
                "Is there a plan for a calendar view of {month}?", "A shortcut to copy a {item} would help."],
}
HOW = {
    "high": ["Our whole team is blocked.", "This is urgent, customers are waiting.", "We are losing money every hour.", "I need this fixed today.", "Please call me at once."],
    "normal": ["", "Thanks for your help.", "Can you look into it?", "Please let me know.", "Kind regards."],
    "low": ["No hurry at all.", "Whenever you find the time.", "It is a small thing.", "It can wait until next month.", "Just curious."],
}


def triage(rng):
    queue, priority = rng.choice(sorted(ABOUT)), rng.choice(sorted(HOW))
    about = rng.choice(ABOUT[queue]).format(plan=rng.choice(["basic", "team", "gold", "school"]), month=rng.choice(MONTHS), day=rng.choice(WEEKDAYS), item=rng.choice(ITEMS))
    greeting, how = rng.choice(["", "", "Hello,", "Hi team,", "Good morning."]), rng.choice(HOW[priority])
    parts = [greeting, about, how] if rng.random() < 0.7 else [greeting, how, about]
    return " ".join(part for part in parts if part), f"{queue}/{priority}"


# phrases: English to Spanish with a closed vocabulary. Endings agree in gender and number; the adjective follows the noun.

NOUNS = [("dog", "perro", "m"), ("cat", "gato", "m"), ("book", "libro", "m"), ("hat", "sombrero", "m"), ("horse", "caballo", "m"), ("shoe", "zapato", "m"), ("glass", "vaso", "m"), ("plate", "plato", "m"),
         ("table", "mesa", "f"), ("chair", "silla", "f"), ("letter", "carta", "f"), ("shirt", "camisa", "f"), ("apple", "manzana", "f"), ("door", "puerta", "f"), ("box", "caja", "f"), ("bicycle", "bicicleta", "f")]
PLURALS = {"glass": "glasses", "box": "boxes"}
ADJECTIVES = [("red", "rojo"), ("black", "negro"), ("white", "blanco"), ("small", "pequeño"), ("new", "nuevo"), ("old", "viejo"), ("cheap", "barato"), ("expensive", "caro"), ("clean", "limpio"), ("yellow", "amarillo")]
SUBJECTS = [("I", ""), ("you", ""), ("he", "él "), ("she", "ella "), ("we", ""), ("they", "ellos ")]
VERBS = [("buy", "buys", ["compro", "compras", "compra", "compra", "compramos", "compran"]), ("sell", "sells", ["vendo", "vendes", "vende", "vende", "vendemos", "venden"]),
         ("see", "sees", ["veo", "ves", "ve", "ve", "vemos", "ven"]), ("want", "wants", ["quiero", "quieres", "quiere", "quiere", "queremos", "quieren"]),
         ("need", "needs", ["necesito", "necesitas", "necesita", "necesita", "necesitamos", "necesitan"]), ("look for", "looks for", ["busco", "buscas", "busca", "busca", "buscamos", "buscan"])]
PLACES = [("in the kitchen", "en la cocina"), ("in the garden", "en el jardín"), ("at the market", "en el mercado"), ("in the street", "en la calle"), ("", ""), ("", "")]
TIMES = [("today", "hoy"), ("now", "ahora"), ("on Monday", "el lunes"), ("", ""), ("", "")]
DETERMINERS = [("the", "el", "la"), ("a", "un", "una"), ("my", "mi", "mi"), ("this", "este", "esta")]
PLURAL_DETERMINERS = [("the", "los", "las"), ("two", "dos", "dos"), ("three", "tres", "tres"), ("my", "mis", "mis"), ("these", "estos", "estas"), ("many", "muchos", "muchas")]


def phrases(rng):
    person = rng.randrange(len(SUBJECTS))
    (subject, sujeto), (verb, verb_s, forms) = SUBJECTS[person], rng.choice(VERBS)
    (noun, nombre, gender), (adjective, adjetivo) = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    plural = rng.random() < 0.5
    determiner, masculine, feminine = rng.choice(PLURAL_DETERMINERS if plural else DETERMINERS)
    if determiner == "a" and adjective[0] in "aeiou":
        determiner = "an"
    if gender == "f":
        adjetivo = adjetivo[:-1] + "a"
    if plural:
        noun, nombre, adjetivo = PLURALS.get(noun, noun + "s"), nombre + "s", adjetivo + "s"
    (place, lugar), (time, tiempo) = rng.choice(PLACES), rng.choice(TIMES)
    english = [subject, verb_s if subject in ("he", "she") else verb, determiner, adjective, noun, place, time]
    spanish = [sujeto.strip(), forms[person], feminine if gender == "f" else masculine, nombre, adjetivo, lugar, tiempo]
    return tuple((sentence[0].upper() + sentence[1:] + ".") for sentence in (" ".join(filter(None, words)) for words in (english, spanish)))


TASKS = {task.name: task for task in [
    Task("dates", "Dates to ISO 8601", "Write the date in ISO 8601.", dates, 16),
    Task("sql", "Questions to SQL", "Write one SQL query. Tables: users(id, name, city, age), orders(id, user_id, item, price).", sql, 40),
    Task("contacts", "Contact details to JSON", "Extract the contact as JSON.", contacts, 36),
    Task("triage", "Support tickets to queue and priority", "Label the ticket as queue/priority.", triage, 12),
    Task("phrases", "English phrases to Spanish", "Translate to Spanish.", phrases, 40),
]}
