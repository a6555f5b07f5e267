//! Which object stood in the place of another before: what a client may have of it, to make a delta from.

use super::packs::ObjectNumber;
use super::set::ObjectSet;

/// By object, the version before it; 4 bytes for each object of a [`PackSet`](super::packs::PackSet). The default has
/// no room and notes nothing.
#[derive(Default)]
pub struct Versions {
    /// The number of the version before and 1, or 0.
    before: Vec<u32>,
}

impl Versions {
    pub fn with_room_for(objects: u32) -> Self {
        Self {
            before: vec![0; objects as usize],
        }
    }

    /// All versions that objects have before them.
    pub fn all(&self) -> impl Iterator<Item = ObjectNumber> + '_ {
        let noted = self.before.iter().filter(|noted| **noted != 0);
        noted.map(|noted| ObjectNumber(noted - 1))
    }

    /// Whether what is noted is kept.
    pub fn are_kept(&self) -> bool {
        !self.before.is_empty()
    }

    /// Notes that `object` replaced `before`, unless it is known to have replaced another.
    pub fn note(&mut self, object: ObjectNumber, before: ObjectNumber) {
        if let Some(noted @ 0) = self.before.get_mut(object.0 as usize) {
            *noted = before.0 + 1;
        }
    }

    /// The version before `object`; after [`Versions::settle`], the last one that is not sent.
    pub fn before(&self, object: ObjectNumber) -> Option<ObjectNumber> {
        let noted = self.before.get(object.0 as usize)?;
        Some(ObjectNumber(noted.checked_sub(1)?))
    }

    /// Follows every object to the last version before it that is not `sent`, and forgets the others.
    pub fn settle(&mut self, sent: &ObjectSet) {
        let mut followed = Vec::new();
        for object in (0..self.before.len() as u32).map(ObjectNumber) {
            let mut at = object;
            let version = loop {
                match self.before(at) {
                    Some(before) if sent.contains(before) => {
                        followed.push(at);
                        // So that whoever comes here again, since a content has come back, goes no further.
                        self.before[at.0 as usize] = 0;
                        at = before;
                    }
                    found => break found.map_or(0, |version| version.0 + 1),
                }
            };
            for object in followed.drain(..) {
                self.before[object.0 as usize] = version;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found for each object, where these are sent and each of these replaced the next.
    fn settled(sent: &[u32], lines: &[&[u32]]) -> Vec<Option<u32>> {
        let mut versions = Versions::with_room_for(10);
        for pair in lines.iter().flat_map(|line| line.windows(2)) {
            versions.note(ObjectNumber(pair[0]), ObjectNumber(pair[1]));
        }
        let mut set = ObjectSet::with_room_for(10);
        for object in sent {
            set.insert(ObjectNumber(*object));
        }
        versions.settle(&set);
        let found = |object| Some(versions.before(ObjectNumber(object))?.0);
        (0..10).map(found).collect()
    }

    #[test]
    fn the_last_version_that_stays_is_found() {
        let mut expected = vec![None; 10];
        for (object, version) in [(0, 5), (4, 5), (3, 5), (2, 5), (1, 5), (5, 6), (7, 5)] {
            expected[object] = Some(version);
        }
        let sent = [0, 1, 2, 3, 4, 7];
        assert_eq!(settled(&sent, &[&[0, 4, 3, 2, 1, 5, 6], &[7, 4]]), expected);
    }

    #[test]
    fn circles_and_beginnings_have_none() {
        let sent = [0, 1, 2, 3, 4, 5];
        assert_eq!(
            settled(&sent, &[&[0, 1, 2, 0], &[3, 2], &[4, 5]]),
            [None; 10]
        );
    }

    #[test]
    fn the_first_note_counts_and_without_room_none() {
        assert_eq!(settled(&[1], &[&[1, 2], &[1, 3]])[1], Some(2));
        let mut none = Versions::default();
        none.note(ObjectNumber(0), ObjectNumber(1));
        assert!(!none.are_kept() && none.before(ObjectNumber(0)).is_none());
    }
}
