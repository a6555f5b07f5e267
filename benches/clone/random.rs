//! Repeatable randomness: the generated repository is the same for the same seed, on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014): a few instructions, good enough for text, and no dependency whose next
/// release draws other numbers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A stream of its own, e.g. for each file, so that streams can be drawn in any order.
    pub fn stream(seed: u64, number: u64) -> Self {
        let mut mixed = Self(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        mixed.next();
        mixed
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..limit`; the bias of the remainder does not matter here.
    pub fn below(&mut self, limit: usize) -> usize {
        debug_assert!(limit > 0);
        (self.next() % limit as u64) as usize
    }

    /// A number in `0..limit` that prefers small ones, as some files change far more often than others. Integers
    /// only: floating point may differ between machines.
    pub fn low_below(&mut self, limit: usize) -> usize {
        let position = u128::from(self.next() >> 32);
        ((position * position * limit as u128) >> 64) as usize
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.next() % 100 < chance
    }
}
