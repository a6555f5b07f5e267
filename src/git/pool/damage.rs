//! Mirrors that turn out to be damaged: they are taken out of service at once, set aside, and fetched again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Pool;
use super::entry::{Entry, Failure};
use crate::git::mirror::MirrorFolder;
use crate::git::objects::ObjectError;
use crate::git::objects::packs::Pack;
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
        match error {
            // What cannot be read of an open pack is `Damaged`; `Io` tells of the output or the machine.
            ObjectError::Cancelled | ObjectError::Io(_) | ObjectError::TooDeep(_) => {}
            ObjectError::Missing(_) | ObjectError::Damaged { .. } | ObjectError::Kind { .. } => {
                if !self
                    .set_aside(entry, Some(snapshot), &error.to_string())
                    .await
                {
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
                    self.fly(&entry, upstream);
                }
            }
        }
    }

    /// Takes the mirror out of service, if it is still the one that was `seen`, and sets damaged packs aside. Returns
    /// whether it was.
    pub(super) async fn set_aside(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        seen: Option<&Arc<Snapshot>>,
        what: &str,
    ) -> bool {
        {
            let mut state = entry.state();
            let same = match (seen, &state.snapshot) {
                (Some(seen), Some(now)) => Arc::ptr_eq(seen, now),
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
        let (pool, entry, snapshot) = (
            Arc::clone(self),
            Arc::clone(entry),
            Arc::downgrade(snapshot),
        );
        self.spawn(async move {
            let Ok(permit) = Arc::clone(&pool.background).acquire_owned().await else {
                return;
            };
            let Some(snapshot) = snapshot.upgrade() else {
                return;
            };
            let checked = Arc::clone(&snapshot);
            let result = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                checked
                    .packs
                    .packs()
                    .iter()
                    .try_for_each(|pack| pack.verify())
            });
            match result.await {
                Ok(Ok(())) => entry.state().verified = true,
                Ok(Err(error)) => pool.report(&entry, &snapshot, &error).await,
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
