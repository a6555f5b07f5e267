//! Rounds of clients that start together.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::process;
use crate::wire::{self, Received, Remote, Work};

/// One case measured against one server.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Median over the rounds of the time from the first client's start to the last one's end.
    pub wall: Duration,
    pub rounds: usize,
    /// What one client got.
    pub received: Received,
    /// Times that a client was told 503 and asked again, in all rounds.
    pub refusals: usize,
    /// Per round.
    pub server_cpu: Option<Duration>,
    pub client_cpu: Duration,
    /// Bytes.
    pub peak_memory: Option<u64>,
    /// Bytes of mapped files in it, at the end.
    pub mapped_files: Option<u64>,
}

/// Short rounds are repeated, long ones are not.
const ENOUGH: Duration = Duration::from_secs(4);
pub const MOST_ROUNDS: usize = 20;

/// Rounds of a server that stays as it is.
pub fn rounds(work: &Work, remote: &Remote, clients: usize) -> Result<Figures> {
    rounds_with(MOST_ROUNDS, |_| round(work, remote, clients))
}

pub fn rounds_with(most: usize, mut next: impl FnMut(usize) -> Result<Round>) -> Result<Figures> {
    let cpu_before = process::cpu_time(std::process::id());
    let mut all = Vec::new();
    while all.len() < most && all.iter().map(|round: &Round| round.wall).sum::<Duration>() < ENOUGH
    {
        all.push(next(all.len())?);
    }
    let rounds = all.len();
    let client_cpu = process::cpu_time(std::process::id()).saturating_sub(cpu_before);
    all.sort_by_key(|round| round.wall);
    let median = &all[rounds / 2];
    Ok(Figures {
        wall: median.wall,
        rounds,
        received: median.received,
        refusals: all.iter().map(|round| round.refusals).sum(),
        server_cpu: None,
        client_cpu: client_cpu / rounds as u32,
        peak_memory: None,
        mapped_files: None,
    })
}

pub struct Round {
    pub wall: Duration,
    pub received: Received,
    pub refusals: usize,
}

/// All clients once, each on a thread and a connection of its own.
pub fn round(work: &Work, remote: &Remote, clients: usize) -> Result<Round> {
    let barrier = Barrier::new(clients);
    let client = || -> Result<(Instant, Received, Instant)> {
        barrier.wait();
        let started = Instant::now();
        let received = wire::perform(work, remote, None)?;
        Ok((started, received, Instant::now()))
    };
    let results: Result<Vec<_>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a client does not panic"))
            .collect()
    });
    let results = results?;
    let first = results.iter().map(|(started, ..)| *started).min();
    let last = results.iter().map(|(.., ended)| *ended).max();
    let (Some(first), Some(last)) = (first, last) else {
        anyhow::bail!("expected at least one client");
    };
    let received = results[0].1;
    let pack_objects = |received: &Received| received.pack.map(|pack| pack.objects);
    ensure!(
        results
            .iter()
            .all(|(_, other, _)| pack_objects(other) == pack_objects(&received)),
        "clients that asked the same got packs of different numbers of objects"
    );
    Ok(Round {
        wall: last - first,
        received,
        refusals: results.iter().map(|(_, one, _)| one.refusals).sum(),
    })
}
