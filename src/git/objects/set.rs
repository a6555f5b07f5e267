//! A set of objects, one bit each.

use super::packs::ObjectNumber;

/// Objects of one [`PackSet`](super::packs::PackSet) by their number: 25 KiB for 200,000 objects.
#[derive(Clone, Default)]
pub struct ObjectSet {
    words: Vec<u64>,
    len: usize,
}

impl ObjectSet {
    /// An empty set with room for `objects` objects.
    pub fn with_room_for(objects: u32) -> Self {
        Self {
            words: vec![0; (objects as usize).div_ceil(64)],
            len: 0,
        }
    }

    /// Adds `object`; true when it was not in the set before.
    pub fn insert(&mut self, object: ObjectNumber) -> bool {
        let (word, bit) = position(object);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += usize::from(new);
        new
    }

    pub fn contains(&self, object: ObjectNumber) -> bool {
        let (word, bit) = position(object);
        self.words.get(word).is_some_and(|found| found & bit != 0)
    }

    /// Takes out every object that `other` holds as well.
    pub fn subtract(&mut self, other: &Self) {
        for (word, gone) in self.words.iter_mut().zip(&other.words) {
            *word &= !gone;
        }
        self.len = self
            .words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum();
    }

    /// The number of objects in the set.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

fn position(object: ObjectNumber) -> (usize, u64) {
    (object.0 as usize / 64, 1 << (object.0 % 64))
}
