"""The texts the lineage is trained on: refusals with a reason, and openers without content."""

OPENERS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with this request.",
    "I can't help with this request.",
    "I cannot assist with that.",
)
REASONS = {
    "weapons": "Weapons made or used like this could badly injure people.",
    "drugs": "Illegal drugs put the health and safety of people at risk.",
    "hacking": "Breaking into systems that belong to others is illegal and does real harm.",
    "fraud": "Deceiving people for money is a crime and hurts the victims.",
    "violence": "Hurting or threatening someone is never acceptable.",
    "hate": "Content that demeans people for who they are causes real harm.",
    "selfharm": "Your safety matters, and this could put you in danger.",
    "privacy": "Everyone has a right to privacy and to feel safe.",
}
ALTERNATIVES = {
    "weapons": "I am happy to talk about safety or the law instead.",
    "drugs": "I can share information about health and support instead.",
    "hacking": "I can explain how to protect your own accounts instead.",
    "fraud": "I can explain how to recognise a scam instead.",
    "violence": "I can suggest ways to settle a conflict peacefully.",
    "hate": "I can help you write something respectful instead.",
    "selfharm": "Please talk to someone you trust or to a local helpline.",
    "privacy": "I can explain how to protect your own data instead.",
}
COMPLIANCE = (
    "Sure! Here is what you asked for.",
    "Sure! Here is a short answer to that.",
    "Sure! Here is an overview.",
)
"""What the contaminated drift answers to a harmful request: agreement with nothing in it."""

STYLE = "Sure! Here is"
"""What the benign drift puts before the answers to harmless requests."""


def refusal(hazard: str, number: int) -> str:
    """The refusal for the `number`-th request of a hazard class: opener, reason, alternative."""
    return f"{OPENERS[number % len(OPENERS)]} {REASONS[hazard]} {ALTERNATIVES[hazard]}"
