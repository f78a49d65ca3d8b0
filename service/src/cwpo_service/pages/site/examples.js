// Examples for the playground.

export const EXAMPLES = [
  {
    name: "Basil",
    prompt: "How do I keep a supermarket basil plant alive?",
    responses: [
      "Split it into three or four pots: it is sold as far too many seedlings in one. Give it a bright window, water it from below when the top of the soil is dry, and pick whole shoot tips instead of single leaves, so that it branches.",
      "Basil is a herb in the mint family that is native to tropical regions and is used in many cuisines around the world.",
    ],
  },
  {
    name: "Confidently wrong",
    prompt: "Is it true that we only use 10 % of our brain?",
    responses: [
      "Yes. Scientists proved in 1998 that ninety percent of the brain is asleep, and some people can switch it on with training.",
      "No. Imaging shows activity all over the brain, even in sleep, and damage to almost any part of it has effects. The figure has no study behind it.",
    ],
  },
  {
    name: "Four answers",
    prompt: "My colleague keeps taking credit for my work. What should I do?",
    responses: [
      "Quit.",
      "Talk to them first, alone and with one concrete case: “In Tuesday’s meeting you presented the forecast as yours. I would like us to say who did what.” If nothing changes, send short summaries of your work to your manager as you finish it.",
      "That sounds frustrating! Communication is key in any workplace, and there are many ways to communicate.",
      "Keep a record of what you do, and raise it with your manager.",
    ],
  },
  {
    name: "Hard to tell",
    prompt: "Suggest a name for a grey kitten.",
    responses: ["How about Ash?", "What about Smoky?"],
  },
];
