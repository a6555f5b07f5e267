//! The answers that builders will want, made before they ask: everything, and HEAD at depth 1.

use std::io;
use std::sync::Arc;

use super::Pool;
use super::entry::Entry;
use crate::git::answers::Found;
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::advertise::WantPolicy;
use crate::git::upload_pack::negotiate::Common;
use crate::git::upload_pack::plan::{self, Plan};
use crate::git::upload_pack::request::{Band, Deepen, FetchRequest};
use crate::storage::Part;

impl Pool {
    /// Makes the usual answers of a warm repository, unless they are there.
    pub(super) async fn prepare_if_warm(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        snapshot: &Arc<Snapshot>,
    ) {
        let warm = self.config.borrow().git.warm.contains(&entry.name);
        if warm {
            self.prepare(entry, snapshot).await;
        }
    }

    /// The same while the mirror is in service already.
    pub(super) fn prepare_in_background(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        snapshot: &Arc<Snapshot>,
    ) {
        let (pool, entry, snapshot) = (Arc::clone(self), Arc::clone(entry), Arc::clone(snapshot));
        self.spawn(async move { pool.prepare_if_warm(&entry, &snapshot).await });
    }

    async fn prepare(self: &Arc<Self>, entry: &Arc<Entry>, snapshot: &Arc<Snapshot>) {
        for request in usual_requests(snapshot) {
            let Ok(permit) = Arc::clone(&self.background).acquire_owned().await else {
                return;
            };
            // A fetch that came meanwhile prepares its own.
            let is_current = |current: Arc<Snapshot>| Arc::ptr_eq(&current, snapshot);
            if !entry.snapshot().is_some_and(is_current) {
                return;
            }
            let (pool, name, snapshot) =
                (Arc::clone(self), entry.name.clone(), Arc::clone(snapshot));
            let (from, same) = (Arc::clone(&snapshot), Arc::clone(entry));
            let made = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let Some(plan) = plan_of(&request, &snapshot) else {
                    return Ok(());
                };
                if plan.is_whole() && !pool.answers.has(&name, plan.key()) {
                    // For what will not fit beside what stays, nothing is evicted.
                    let (bytes, beside) = (snapshot.packs.bytes(), pool.bytes_beside(&same));
                    let room = pool.storage.nothing(Part::Answers);
                    room.can_grow(bytes, beside).map_err(io::Error::from)?;
                }
                match pool.answers.get_or_new(&name, plan.key(), true) {
                    Found::Kept(_) => Ok(()),
                    Found::New(_, writer) => {
                        if plan.is_whole() {
                            pool.answers.supersede_whole(&name, plan.key());
                        }
                        writer
                            .run(|out, cancelled| {
                                plan.write(&snapshot, out, &|| {
                                    cancelled()
                                        || pool.stop.load(std::sync::atomic::Ordering::Relaxed)
                                })
                            })
                            .map(|_| ())
                    }
                }
            });
            match made.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(repo = %entry.name, %error, "an answer was not prepared");
                    return self.report(entry, &from, &error).await;
                }
                Err(panic) => {
                    return tracing::error!(repo = %entry.name, error = %panic, "an answer was not prepared");
                }
            }
        }
    }
}

fn usual_requests(snapshot: &Snapshot) -> Vec<FetchRequest> {
    let usual = FetchRequest {
        done: true,
        ofs_delta: true,
        thin_pack: true,
        include_tag: true,
        band: Band::Large,
        ..FetchRequest::default()
    };
    let mut wants: Vec<_> = snapshot.refs.tips().collect();
    wants.sort_unstable();
    wants.dedup();
    if wants.is_empty() {
        return Vec::new();
    }
    let everything = FetchRequest {
        wants,
        ..usual.clone()
    };
    let head = snapshot.refs.head_id().map(|head| FetchRequest {
        wants: vec![head],
        deepen: Deepen {
            depth: Some(1),
            ..Deepen::default()
        },
        ..usual
    });
    head.into_iter().chain([everything]).collect()
}

fn plan_of(request: &FetchRequest, snapshot: &Snapshot) -> Option<Plan> {
    let commits = snapshot.commits();
    let wants =
        plan::check_wants(&request.wants, snapshot, &commits, WantPolicy::Reachable).ok()?;
    plan::plan(request, &wants, &Common::none(&commits), snapshot, &commits).ok()
}
