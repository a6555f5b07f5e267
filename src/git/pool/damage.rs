//! Mirrors that turn out to be damaged: they are taken out of service at once, set aside, and fetched again.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Pool;
use super::entry::{Entry, Failure};
use crate::git::mirror::MirrorFolder;
use crate::git::objects::ObjectError;
use crate::git::objects::packs::{Pack, PackSet};
use crate::git::snapshot::Snapshot;
use crate::git::upstream::UpstreamError;

/// A mirror that is damaged again within this time came so from its upstream.
const AGAIN: Duration = Duration::from_secs(3600);

impl Pool {
    /// Making a pack from `snapshot` failed with `error`: when that says that the mirror is not whole, no more is
    /// served from it.
    pub async fn report(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        snapshot: &Arc<Snapshot>,
        error: &ObjectError,
    ) {
        self.report_packs(entry, &snapshot.packs, error).await;
    }

    /// The same of `packs` that the mirror has, or had a moment ago.
    async fn report_packs(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        packs: &PackSet,
        error: &ObjectError,
    ) {
        match error {
            // What cannot be read of an open pack is `Damaged`; `Io` tells of the output or the machine.
            ObjectError::Cancelled | ObjectError::Io(_) | ObjectError::TooDeep(_) => {}
            ObjectError::Missing(_) | ObjectError::Damaged { .. } | ObjectError::Kind { .. } => {
                if !self.set_aside(entry, Some(packs), &error.to_string()).await {
                    return;
                }
                let again = {
                    let mut state = entry.state();
                    let last = state.set_aside.replace(Instant::now());
                    last.is_some_and(|last| last.elapsed() < AGAIN)
                };
                if again {
                    let text = format!(
                        "the repository was damaged twice; is it whole at the upstream? {error}"
                    );
                    let mut state = entry.state();
                    state.failed = Some(Failure::after(
                        state.failed.as_ref(),
                        UpstreamError::Hopeless(text),
                    ));
                } else if let Ok((entry, upstream)) = self.allowed_entry(&entry.name).await {
                    let flight = self.fly(&entry, Arc::clone(&upstream));
                    // What was under way builds on what was set aside, and fails.
                    if !flight.first {
                        let pool = Arc::clone(self);
                        self.spawn(async move {
                            let _ = flight.wait().await;
                            pool.fly(&entry, upstream);
                        });
                    }
                }
            }
        }
    }

    /// Takes the mirror out of service, if it still has the packs that were `seen`, and sets damaged ones aside. Returns
    /// whether it has. Fetches that came meanwhile have not mended what is there.
    pub(super) async fn set_aside(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        seen: Option<&PackSet>,
        what: &str,
    ) -> bool {
        {
            let mut state = entry.state();
            let same = match (seen, &state.snapshot) {
                (Some(seen), Some(now)) => now.packs.has_all(seen),
                (None, None) => state.on_disk,
                _ => false,
            };
            if !same {
                return false;
            }
            state.snapshot = None;
            state.on_disk = false;
            state.fresh = None;
            state.verified = false;
        }
        self.metrics.damaged_pack();
        tracing::error!(repo = %entry.name, error = what, "the mirror is damaged: it is set aside and fetched again");
        let folder = entry.folder.clone();
        if let Err(error) =
            tokio::task::spawn_blocking(move || set_damaged_packs_aside(&folder)).await
        {
            tracing::error!(repo = %entry.name, %error, "damaged packs were not set aside");
        }
        true
    }

    /// Compares every byte with its checksum while the mirror is in service already.
    pub(super) fn verify_in_background(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        snapshot: &Arc<Snapshot>,
    ) {
        let (pool, entry) = (Arc::clone(self), Arc::clone(entry));
        // Not the snapshot, which the next fetch replaces: what it keeps of the packs is to be looked at all the same.
        let packs: Vec<Weak<Pack>> = snapshot.packs.packs().iter().map(Arc::downgrade).collect();
        self.spawn(async move {
            let Ok(permit) = Arc::clone(&pool.background).acquire_owned().await else {
                return;
            };
            let result = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let mut is_all = true;
                for pack in packs {
                    // What was consolidated or evicted meanwhile needs it no more, and a mirror that was closed is verified
                    // when it is opened again.
                    let Some(pack) = pack.upgrade() else {
                        is_all = false;
                        continue;
                    };
                    pack.verify()
                        .map_err(|error| (PackSet::new(vec![pack]), error))?;
                }
                Ok(is_all)
            });
            match result.await {
                Ok(Ok(is_all)) => entry.state().verified |= is_all,
                Ok(Err((damaged, error))) => pool.report_packs(&entry, &damaged, &error).await,
                Err(_) => {}
            }
        });
    }
}

fn set_damaged_packs_aside(folder: &MirrorFolder) {
    let indices = match folder.indices() {
        Ok(indices) => indices,
        Err(error) => return tracing::error!(%error, "the damaged mirror cannot be read"),
    };
    for index in indices {
        // Nothing else is a reason to give a pack up.
        if let Err(error @ ObjectError::Damaged { .. }) =
            Pack::open(&index).and_then(|pack| pack.verify())
        {
            let aside = folder.set_aside(&index);
            tracing::error!(%error, set_aside = aside.is_ok(), "found a damaged pack");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::pool::Flight;
    use crate::git::pool::over_files::{OverFiles, wait_for};

    /// As after a restart while the upstream has moved on: the mirror is opened and fetched at once.
    #[tokio::test(flavor = "multi_thread")]
    async fn damage_is_found_also_where_a_fetch_is_quicker() {
        let over = OverFiles::new(&["team/app"]);
        let pool = over.start();
        let entry = over.mirrored(&pool, "team/app").await;
        pool.shutdown().await;
        drop(pool);
        let index = entry.folder.indices().unwrap().remove(0);
        rot(&index.with_extension("pack"));
        over.commit("team/app", "second");

        let pool = over.start();
        let all = pool.background.available_permits() as u32;
        let nobody_looks = Arc::clone(&pool.background).acquire_many_owned(all);
        let nobody_looks = nobody_looks.await.unwrap();
        let entry = over.mirrored(&pool, "team/app").await;
        let packs = entry.snapshot().unwrap().packs.packs().len();
        assert_eq!(packs, 2, "it was fetched");
        drop(nobody_looks);
        wait_for("the damaged pack to be set aside", || {
            index.with_extension("idx-damaged").exists() || !index.exists()
        })
        .await;
        let is_whole = || {
            entry
                .snapshot()
                .is_some_and(|now| now.packs.packs().len() == 1)
        };
        wait_for("the mirror to be fetched again", is_whole).await;
        pool.shutdown().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_set_aside_under_a_fetch_is_fetched_again_after_it() {
        let over = OverFiles::new(&["team/app"]);
        let pool = over.start();
        let entry = over.mirrored(&pool, "team/app").await;
        let snapshot = entry.snapshot().unwrap();
        let under_way = Flight::new(false);
        entry.state().flight = Some(Arc::clone(&under_way));
        let missing = ObjectError::Missing(gix_hash::ObjectId::null(gix_hash::Kind::Sha1));
        pool.report(&entry, &snapshot, &missing).await;
        assert!(entry.snapshot().is_none());
        entry.state().flight = None;
        under_way.finish(Err(UpstreamError::Stopped));
        wait_for("the mirror to be fetched again", || {
            entry.snapshot().is_some()
        })
        .await;
        pool.shutdown().await;
    }

    /// Changes a byte in the middle, of what no fetch reads.
    fn rot(pack: &std::path::Path) {
        let mut bytes = std::fs::read(pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::remove_file(pack).unwrap();
        std::fs::write(pack, bytes).unwrap();
    }
}
