//! Text files that change as source files do: a few lines here and there from one version to the next.

use crate::random::Random;

/// Words that lines are made of. A vocabulary of this size compresses about as source code does.
pub struct Vocabulary(Vec<String>);

impl Vocabulary {
    pub fn new(seed: u64) -> Self {
        const SYLLABLES: [&str; 32] = [
            "ar", "be", "co", "du", "el", "fi", "gra", "hu", "in", "jo", "ka", "lo", "mi", "no",
            "op", "pre", "qui", "re", "sta", "tu", "un", "ver", "wa", "ex", "ya", "zi", "tion",
            "ment", "er", "ing", "ed", "_",
        ];
        let mut random = Random::stream(seed, u64::MAX);
        let words = (0..8000).map(|_| {
            let syllables = 2 + random.below(4);
            (0..syllables)
                .map(|_| SYLLABLES[random.below(SYLLABLES.len())])
                .collect()
        });
        Self(words.collect())
    }

    fn word(&self, random: &mut Random) -> &str {
        &self.0[random.low_below(self.0.len())]
    }

    /// Words for a commit or tag message, without line ends.
    pub fn sentence(&self, words: usize, random: &mut Random) -> String {
        let words: Vec<&str> = (0..words).map(|_| self.word(random)).collect();
        words.join(" ")
    }

    fn line(&self, random: &mut Random) -> String {
        if random.percent(12) {
            return "\n".to_owned();
        }
        let mut line = " ".repeat(4 * random.below(4));
        for index in 0..2 + random.below(7) {
            if index > 0 {
                line.push_str([" ", ".", "(", " = ", ", "][random.below(5)]);
            }
            if random.percent(8) {
                line.push_str(&format!("{:#x}", random.next() & 0xFF_FFFF));
            } else {
                line.push_str(self.word(random));
            }
        }
        line.push_str([";\n", "\n", " {\n", ")\n"][random.below(4)]);
        line
    }
}

/// A file through its versions.
pub struct TextFile<'v> {
    vocabulary: &'v Vocabulary,
    random: Random,
    lines: Vec<String>,
}

impl<'v> TextFile<'v> {
    pub fn new(vocabulary: &'v Vocabulary, mut random: Random) -> Self {
        let length = 30 + random.low_below(330);
        let lines = (0..length).map(|_| vocabulary.line(&mut random)).collect();
        Self {
            vocabulary,
            random,
            lines,
        }
    }

    pub fn write_to(&self, content: &mut Vec<u8>) {
        content.clear();
        for line in &self.lines {
            content.extend_from_slice(line.as_bytes());
        }
    }

    /// The next version: a handful of hunks, now and then a rewrite of a larger part.
    pub fn edit(&mut self) {
        let hunks = if self.random.percent(3) {
            8 + self.random.below(12)
        } else {
            1 + self.random.below(9)
        };
        for _ in 0..hunks {
            let at = self.random.below(self.lines.len());
            // Files grow slowly, and long ones shrink again.
            let longest = if self.lines.len() > 500 { 40 } else { 19 };
            let removed = self.random.below(longest).min(self.lines.len() - at);
            let added = 1 + self.random.below(18);
            let new: Vec<String> = (0..added)
                .map(|_| self.vocabulary.line(&mut self.random))
                .collect();
            self.lines.splice(at..at + removed, new);
        }
    }
}
