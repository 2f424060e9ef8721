"""Words and plots from which the training stories are built.

A plot is a list of sentences. "[a|b]" stands for one of the alternatives and
may be nested; "{name}" is a field that generate_text.py fills in. Fields that
start with "f_" belong to the second character, the friend.
"""

NAMES = {
    "he": ["Tom", "Ben", "Max", "Sam", "Leo", "Oscar", "Finn", "Jack", "Toby", "Milo"],
    "she": ["Lily", "Mia", "Anna", "Rosie", "Daisy", "Ella", "Ruby", "Nora", "Poppy", "Zoe"],
}
ANIMALS = [
    "cat",
    "dog",
    "rabbit",
    "bear",
    "fox",
    "mouse",
    "owl",
    "frog",
    "duck",
    "bird",
    "turtle",
    "squirrel",
    "pony",
    "lamb",
    "dragon",
]
PEOPLE = ["girl", "boy"]
FOODS = ["bread", "cake", "honey", "soup", "cheese", "pie"]
WORDS = {
    "adj": ["little", "small", "young", "brave", "kind", "happy", "clever", "shy", "quiet", "curious"],
    "f_adj": ["friendly", "kind", "wise", "old", "gentle", "funny"],
    "colour": ["red", "blue", "green", "yellow", "white", "golden"],
    "toy": ["ball", "kite", "boat", "hat", "bell", "box", "scarf", "drum"],
    "place": [
        "in the garden",
        "in the forest",
        "by the river",
        "on the hill",
        "near the lake",
        "under the old tree",
        "behind the house",
        "in the field",
    ],
    "skill": ["swim", "sing", "climb", "dance", "whistle", "paint", "skate"],
    "trap": ["in the mud", "under a log", "in a net", "in a thorn bush"],
    "treasure": ["a shiny stone", "an old map", "a silver key", "a gold coin", "a box of tiny stars", "a blue feather"],
    "time": ["One day", "One morning", "One sunny day", "One windy day", "One afternoon", "One cold morning"],
}
OPENINGS = [
    "Once upon a time, there was {a_adj} {animal} named {name}. {He} lived in a [small|little|cosy] house {place}.",
    "Once upon a time, {a_adj} {animal} named {name} lived {place}.",
    "Once upon a time there lived {a_adj} {animal} called {name}. Every day {he} played {place}.",
    "Once there was {a_adj} {animal} named {name}. {He} lived {place}.",
    "{name} was {a_adj} {animal}. {He} lived in a [small|little|cosy] house {place}.",
]
PLOTS: dict[str, list[str]] = {
    "lost": [
        "{name} had {a_toy}. {He} loved the {toy} [very much|more than anything] and took it everywhere.",
        "{time}, the {toy} was gone! {name} [looked|searched] {place2}, but it was not there.",
        "{He} [felt very sad|began to cry|was very sad].",
        "Then {a_f_adj} {f_animal} named {f_name} came by.",
        '"[Why are you sad|What is wrong|Why are you crying]?" asked {f_name}.',
        '"I cannot find my {toy}," said {name}.',
        '"[Do not worry|Do not cry], I will help you," said {f_name}.',
        "They looked and looked. [At last|Soon], {f_name} saw something {colour} "
        "[under a leaf|behind a rock|in the tall grass]. It was the {toy}!",
        '"Thank you, {f_name}!" said {name}. {He} [hugged {f_him}|gave {f_him} a big hug].',
        "[From that day on, they were best friends.|They played with the {toy} until the sun "
        "went down.|{name} never lost the {toy} again.]",
    ],
    "friend": [
        "{name} [was lonely|felt lonely], because {he} had no one to play with.",
        "{time}, {he} went for a walk and heard a [sound|noise] {place2}.",
        "It was {a_f_adj} {f_animal}.",
        '"Hello, my name is {f_name}," said the {f_animal}. "[Do you want to play|Will you play with me]?"',
        '"[Yes|Oh yes], please!" said {name}.',
        "They [ran and jumped|played hide and seek|told funny stories|made a tall tower] "
        "all day long. {name} [laughed and laughed|had never had so much fun].",
        "When the [sun went down|moon came up], they were [tired|sleepy] but happy.",
        '"[Will you come back tomorrow|Can we play again tomorrow]?" asked {name}. '
        '"[Of course|Yes, of course]," said {f_name}.',
        "[{name} was not lonely any more.|After that day, {name} was never lonely again.]",
    ],
    "storm": [
        "{time}, {name} was playing {place2} when [dark clouds came|the sky turned dark].",
        "[Soon it began to rain|Then it started to rain], and the wind blew "
        "[hard|very hard]. {name} was [cold and wet|wet and afraid|scared].",
        '"[Come in, come in|Come here, quick]!" called a voice. It was {f_name}, {a_f_adj} {f_animal}.',
        "{name} ran into the [warm|little] house. {f_name} gave {him} [a warm blanket|a dry blanket] and some {food}.",
        "They sat by the fire and [listened to the rain|told each other stories].",
        "[After a while|At last], the rain stopped and [the sun came out|a rainbow filled the sky].",
        '"Thank you for [your help|being so kind]," said {name}. '
        '"[You are welcome|Come back any time]," said {f_name}.',
        "{name} went home [with a smile|with a happy heart], and {he} was not afraid of the rain any more.",
    ],
    "share": [
        "{time}, {name} had some {food} for lunch. It smelled [so good|very good].",
        "{He} sat down {place2} and was about to eat.",
        "Just then, {a_f_adj} {f_animal} named {f_name} walked by. {f_He} looked [very|so] hungry.",
        '"[May I have some {food}|Can I have a little {food}]?" asked {f_name}.',
        '[At first {name} wanted to keep it all.|"It is all mine," said {name}.] '
        "But then {he} saw how [sad|hungry] {f_name} was.",
        '"[Here you are|Come and sit with me]," said {name}. "We can share."',
        "They ate the {food} together, and it tasted [even better|better than ever].",
        'The next day, {f_name} came back with {a_toy}. "This is for you, because you were kind," {f_he} said.',
        "[{name} was very happy.|{name} smiled.] {He} learned that [it is good to share|sharing makes friends].",
    ],
    "learn": [
        "{name} wanted to learn to {skill}, but it was [hard|very hard].",
        "{time}, {he} tried to {skill} {place2}. It did not go well.",
        '"[I will never learn|I cannot do it|It is too hard]," {he} said, and {he} [sat down|began to cry].',
        "{a_f_adj_cap} {f_animal} named {f_name} [saw {him}|heard {him}].",
        '"[Do not give up|Try again|You can do it]," said {f_name}. "I will show you how."',
        "So they [practised|worked] together every day. [Little by little|Day by day], {name} got better.",
        "[At last|Then one day], {name} could {skill} all alone!",
        '"[Look at me|I did it]!" {he} shouted. {f_name} [clapped and cheered|was very proud].',
        "{name} learned that [you must never give up|it helps to try again and again].",
    ],
    "rescue": [
        '{time}, {name} heard a [small|tiny] voice {place2}. "Help! Please help me!"',
        "{He} [ran|hurried] to look. A [small|tiny] {f_animal} named {f_name} was stuck {trap}.",
        '"[Do not be afraid|Stay still]," said {name}. "I will [get you out|help you]."',
        "{He} pulled and pulled, [and at last {f_name} was free|until {f_name} was free].",
        '"Thank you! [One day I will help you too|I will never forget this]," said {f_name}.',
        "Some days later, {name} was lost {place}. It was [dark|getting dark], and {he} was [scared|afraid].",
        'Then {he} saw a light. It was {f_name}! "[Follow me|Come with me]," {f_he} said.',
        "{f_name} showed {him} the way home.",
        "[{name} was glad that {he} had been kind.|They stayed friends for ever.]",
    ],
    "birthday": [
        "{time}, {name} woke up early. It was the birthday of {his} best friend {f_name}, {a_f_adj} {f_animal}.",
        '"[I want to make a gift|What can I give {f_him}]," {name} thought.',
        "{He} [looked in every box|thought for a long time], and then {he} had an idea.",
        "{He} made {a_toy} and [put it in a box|tied a ribbon on it].",
        "Then {he} baked a [big|sweet|small] cake and took it all to {f_name}.",
        '"Happy birthday!" [shouted|said|sang] {name}. {f_name} opened the gift and [smiled|jumped for joy].',
        '"[This is the best {toy} in the world|I love this {toy}]! Thank you, {name}," {f_he} said.',
        "They ate cake and [danced|sang songs|played games] {place2}.",
        "It was [the best birthday ever|a wonderful day].",
    ],
    "treasure": [
        "{time}, {name} wanted to see something new. {He} packed some {food} and [set off|went out].",
        "{He} walked [over the bridge|along the path|through the tall grass] and met {f_name}, {a_f_adj} {f_animal}.",
        '"Where are you going?" asked {f_name}. "I am looking for [treasure|an adventure]," said {name}.',
        "They went on together and found a [dark|deep|small] cave {place2}.",
        '"[I am a little scared|It is so dark]," said {f_name}. "[Hold my hand|Stay close to me]," said {name}.',
        "Inside the cave, they found {treasure}! It [shone like the sun|was beautiful].",
        "They [laughed|cheered] and [ran|walked] home to show it to [everyone|all their friends].",
        "That night, {name} [slept well|fell asleep with a smile] and dreamed of the next adventure.",
    ],
}
