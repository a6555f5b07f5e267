//! What cannot change while the service runs.

use super::Config;

/// Puts the old value back where a change needs a restart.
///
/// Returns the keys whose new value waits for one.
pub fn keep(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut waiting = Vec::new();
    // The listener is bound once, and speaks TLS or not; the certificate itself may change.
    keep_one(
        "listen.http",
        &old.listen.http,
        &mut new.listen.http,
        &mut waiting,
    );
    if old.listen.tls.is_some() != new.listen.tls.is_some() {
        new.listen.tls.clone_from(&old.listen.tls);
        waiting.push("listen.tls");
    }
    keep_one(
        "listen.ssh",
        &old.listen.ssh,
        &mut new.listen.ssh,
        &mut waiting,
    );
    // Mirrors are open in it.
    keep_one("data_dir", &old.data_dir, &mut new.data_dir, &mut waiting);
    // Semaphores and threads of these sizes are made at start.
    keep_one(
        "git.first_clones",
        &old.git.first_clones,
        &mut new.git.first_clones,
        &mut waiting,
    );
    let (old, new) = (&old.limits, &mut new.limits);
    keep_one(
        "limits.connections",
        &old.connections,
        &mut new.connections,
        &mut waiting,
    );
    keep_one(
        "limits.packs_per_repo",
        &old.packs_per_repo,
        &mut new.packs_per_repo,
        &mut waiting,
    );
    keep_one(
        "limits.packs_queue_per_repo",
        &old.packs_queue_per_repo,
        &mut new.packs_queue_per_repo,
        &mut waiting,
    );
    keep_one(
        "limits.pack_threads",
        &old.pack_threads,
        &mut new.pack_threads,
        &mut waiting,
    );
    waiting
}

fn keep_one<T: Clone + PartialEq>(
    key: &'static str,
    old: &T,
    new: &mut T,
    waiting: &mut Vec<&'static str>,
) {
    if old != new {
        new.clone_from(old);
        waiting.push(key);
    }
}
