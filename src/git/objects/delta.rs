//! Makes deltas: how one object is put together from parts of another and from new bytes (git's gitformat-pack,
//! "Deltified representation").
//!
//! Parts of the base are found by their blocks, as rsync does: a hash that rolls over the result is looked up among
//! those of the base's blocks, and what is found is extended to both sides.

/// Bytes of a block. What repeats in less is cheaper as new bytes than as a copy.
const BLOCK: usize = 16;
/// Bytes of one copy. The format has room for more, which not every reader takes.
const LONGEST_COPY: usize = 0x1_0000;
/// New bytes that one instruction holds.
const LONGEST_INSERT: usize = 0x7f;

/// The delta that makes `result` of `base`; none if it would have more than `most` bytes.
///
/// Takes memory of up to the base's size, and time in proportion to both. Both are shorter than 4 GiB.
pub fn between(base: &[u8], result: &[u8], most: usize) -> Option<Vec<u8>> {
    let blocks = Blocks::of(base);
    let mut delta = Delta::new(base.len(), result.len());
    // Where what has no instruction yet begins, and where the next block is looked for.
    let (mut done, mut at) = (0, 0);
    let mut hash = None;
    while let Some(block) = result.get(at..at + BLOCK) {
        let here = hash.unwrap_or_else(|| hash_of(block));
        let Some(from) = blocks
            .find(here)
            .filter(|from| base[*from..].starts_with(block))
        else {
            hash = result
                .get(at + BLOCK)
                .map(|next| rolled(here, block[0], *next));
            at += 1;
            if delta.0.len() + (at - done) > most {
                return None;
            }
            continue;
        };
        let before = alike(base[..from].iter().rev(), result[done..at].iter().rev());
        let behind = alike(&base[from + BLOCK..], &result[at + BLOCK..]);
        delta.insert(&result[done..at - before]);
        delta.copy(from - before, before + BLOCK + behind);
        at += BLOCK + behind;
        (done, hash) = (at, None);
    }
    delta.insert(&result[done..]);
    (delta.0.len() <= most).then_some(delta.0)
}

/// How many bytes are the same from the beginning.
fn alike<'b>(
    one: impl IntoIterator<Item = &'b u8>,
    other: impl IntoIterator<Item = &'b u8>,
) -> usize {
    one.into_iter()
        .zip(other)
        .take_while(|(a, b)| a == b)
        .count()
}

/// Where the base has which block.
struct Blocks {
    /// By hash: a position in the base and 1, or 0.
    slots: Vec<u32>,
    shift: u32,
}

impl Blocks {
    fn of(base: &[u8]) -> Self {
        let blocks = base.chunks_exact(BLOCK);
        let bits = (2 * blocks.len()).next_power_of_two().ilog2().max(1);
        let mut found = Self {
            slots: vec![0; 1 << bits],
            shift: u32::BITS - bits,
        };
        // From the end: of those that are the same, the first has most behind it.
        for (nth, block) in blocks.enumerate().rev() {
            let slot = found.slot(hash_of(block));
            found.slots[slot] = (nth * BLOCK) as u32 + 1;
        }
        found
    }

    fn find(&self, hash: u32) -> Option<usize> {
        Some(self.slots[self.slot(hash)].checked_sub(1)? as usize)
    }

    fn slot(&self, hash: u32) -> usize {
        // Fibonacci hashing: the low bits of a polynomial are poor.
        (hash.wrapping_mul(0x9e37_79b1) >> self.shift) as usize
    }
}

/// A polynomial of a block's bytes, from which the one a byte further follows.
const FACTOR: u32 = 0x0100_0193;
const OLDEST: u32 = FACTOR.wrapping_pow(BLOCK as u32 - 1);

fn hash_of(block: &[u8]) -> u32 {
    block.iter().fold(0, |hash: u32, byte| {
        hash.wrapping_mul(FACTOR).wrapping_add(u32::from(*byte))
    })
}

fn rolled(hash: u32, first: u8, next: u8) -> u32 {
    hash.wrapping_sub(u32::from(first).wrapping_mul(OLDEST))
        .wrapping_mul(FACTOR)
        .wrapping_add(u32::from(next))
}

/// The bytes of a delta.
struct Delta(Vec<u8>);

impl Delta {
    fn new(base: usize, result: usize) -> Self {
        let mut delta = Self(Vec::new());
        for mut size in [base, result] {
            while size > 0x7f {
                delta.0.push(size as u8 | 0x80);
                size >>= 7;
            }
            delta.0.push(size as u8);
        }
        delta
    }

    fn insert(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(LONGEST_INSERT) {
            self.0.push(part.len() as u8);
            self.0.extend_from_slice(part);
        }
    }

    fn copy(&mut self, from: usize, length: usize) {
        for start in (from..from + length).step_by(LONGEST_COPY) {
            let length = (from + length - start).min(LONGEST_COPY) % LONGEST_COPY; // 0 stands for all of it
            let operation = self.0.len();
            self.0.push(0x80);
            let [a, b, c, d, ..] = start.to_le_bytes();
            let [low, high, ..] = length.to_le_bytes();
            for (nth, byte) in [a, b, c, d, low, high].into_iter().enumerate() {
                if byte != 0 {
                    self.0[operation] |= 1 << nth;
                    self.0.push(byte);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a reader makes of a delta, by the format's description.
    fn applied(base: &[u8], delta: &[u8]) -> Vec<u8> {
        let mut bytes = delta.iter().copied();
        let mut size = || {
            let (mut size, mut shift) = (0, 0);
            loop {
                let byte = bytes.next().unwrap();
                size |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    return size;
                }
            }
        };
        assert_eq!(size(), base.len());
        let expected = size();
        let mut result = Vec::new();
        while let Some(operation) = bytes.next() {
            if operation & 0x80 == 0 {
                assert_ne!(operation, 0, "reserved");
                result.extend(bytes.by_ref().take(usize::from(operation)));
                continue;
            }
            let mut number = |bits: std::ops::Range<u32>| {
                bits.clone().fold(0, |number, bit| {
                    let there = operation & (1 << bit) != 0;
                    let byte = if there { bytes.next().unwrap() } else { 0 };
                    number | usize::from(byte) << (8 * (bit - bits.start))
                })
            };
            let (from, length) = (number(0..4), number(4..7));
            let length = if length == 0 { 0x1_0000 } else { length };
            result.extend_from_slice(&base[from..from + length]);
        }
        assert_eq!(result.len(), expected);
        result
    }

    /// Text-like bytes: few values, so that parts repeat.
    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(0..4u8, 0..most)
    }

    /// Bytes that do not repeat (xorshift): much quicker than one by one from a strategy.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let next = |x: &u64| {
            let x = x ^ (x << 13);
            let x = x ^ (x >> 7);
            Some(x ^ (x << 17))
        };
        let words = std::iter::successors(Some(seed | 1), next);
        let bytes = words.skip(1).flat_map(u64::to_le_bytes);
        bytes.take(length).collect()
    }

    proptest! {
        #[test]
        fn whatever_is_made_reads_back(base in bytes(400), result in bytes(400)) {
            let delta = between(&base, &result, usize::MAX).unwrap();
            prop_assert_eq!(applied(&base, &delta), result);
        }

        #[test]
        fn edits_cost_what_they_change(
            (seed, length) in (any::<u64>(), 1000..200_000usize),
            new in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            gone in 0..300usize,
        ) {
            let base = noise(seed, length);
            let at = at.index(base.len());
            let mut result = base.clone();
            result.splice(at..base.len().min(at + gone), new.iter().copied());
            let delta = between(&base, &result, usize::MAX).unwrap();
            // What is new, what is in no whole block beside it, and an operation for every 64 KiB.
            prop_assert!(delta.len() < new.len() + 2 * BLOCK + 64, "{}", delta.len());
            prop_assert_eq!(applied(&base, &delta), result);
        }
    }

    #[test]
    fn copies_are_as_long_as_every_reader_takes() {
        let base: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
        for length in [0xffff, 0x1_0000, 0x1_0001, 0x2_0000, base.len()] {
            let result = &base[base.len() - length..];
            let delta = between(&base, result, 1000).unwrap();
            assert!(delta.len() < 200);
            assert_eq!(applied(&base, &delta), result);
        }
    }

    #[test]
    fn none_where_it_would_save_nothing() {
        let (base, result) = ([1; 1000], [2; 1000]);
        assert_eq!(between(&base, &result, 999), None);
        assert_eq!(between(&[], &[], 2), Some(vec![0, 0]));
        assert_eq!(between(&[], &[], 1), None);
    }
}
