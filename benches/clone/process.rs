//! What /proc says about server processes, and stopping them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// /proc counts CPU time in USER_HZ, which is 100 on all of Linux's common platforms (proc(5), time(7)).
const TICK: Duration = Duration::from_millis(10);

/// What /proc/<pid>/stat says of a process. Times are user's and system's together.
struct Stat {
    parent: u32,
    own: Duration,
    /// Of children that ended and were waited for, and of theirs.
    ended: Duration,
}

fn stat(pid: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces; the fields after it do not.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field)?.parse::<u32>().ok();
    Some(Stat {
        parent: number(1)?,
        own: TICK * (number(11)? + number(12)?),
        ended: TICK * (number(13)? + number(14)?),
    })
}

/// Without that of children.
pub fn cpu_time(pid: u32) -> Duration {
    stat(pid).map_or(Duration::ZERO, |stat| stat.own)
}

/// With that of children which have ended: for servers that start a process for each client.
pub fn cpu_time_with_ended_children(pid: u32) -> Duration {
    stat(pid).map_or(Duration::ZERO, |stat| stat.own + stat.ended)
}

/// The processes `roots` and all below them.
pub fn with_descendants(roots: &[u32]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if let Some(stat) = stat(pid) {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    let mut found = roots.to_vec();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        if let Some(more) = children.get(pid) {
            found.extend(more);
        }
        next += 1;
    }
    found
}

/// CPU time of long-lived processes; that of children which ended meanwhile is not in it.
pub fn cpu_time_of_tree(roots: &[u32]) -> Duration {
    with_descendants(roots).into_iter().map(cpu_time).sum()
}

/// A line of /proc/<pid>/<file> that gives a size, in bytes.
fn size_line(pid: u32, file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kilobytes * 1024)
}

/// Makes the kernel forget the peak so far (proc(5), clear_refs).
pub fn reset_peak_memory(pid: u32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
        .with_context(|| format!("cannot reset the peak memory of process {pid}"))
}

/// The most that was resident since the last reset.
pub fn peak_memory(pid: u32) -> Option<u64> {
    size_line(pid, "status", "VmHWM:")
}

/// Pages of files that are mapped now, which the kernel can take back at any time; peaks count them as well.
pub fn mapped_files(pid: u32) -> Option<u64> {
    size_line(pid, "status", "RssFile:")
}

/// Samples the memory of a process tree that comes and goes; pages shared by several processes count once (PSS).
pub struct MemorySampler {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl MemorySampler {
    const INTERVAL: Duration = Duration::from_millis(25);

    pub fn start(roots: Vec<u32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let peak = Arc::new(AtomicU64::new(0));
        let thread = {
            let (stop, peak) = (Arc::clone(&stop), Arc::clone(&peak));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let sum = with_descendants(&roots)
                        .into_iter()
                        .filter_map(|pid| size_line(pid, "smaps_rollup", "Pss:"))
                        .sum();
                    peak.fetch_max(sum, Ordering::Relaxed);
                    thread::sleep(Self::INTERVAL);
                }
            })
        };
        Self { stop, peak, thread }
    }

    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the sampler does not panic");
        self.peak.load(Ordering::Relaxed)
    }
}

/// Asks a process of ours to end, and kills it if it does not.
pub fn terminate(child: &mut Child) {
    let pid = child.id().to_string();
    let _ = Command::new("kill").args(["-TERM", &pid]).status();
    let deadline = Instant::now() + Duration::from_secs(15);
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Facts about this machine, by name.
pub fn machine() -> BTreeMap<&'static str, String> {
    let mut facts = BTreeMap::new();
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |line| line.trim_start_matches([' ', '\t', ':']));
    facts.insert(
        "cores",
        format!("{cores} ({model}), shared by client and server"),
    );
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    facts.insert("kernel", format!("Linux {}", kernel.trim()));
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    if let Some(total) = memory.lines().find_map(|l| l.strip_prefix("MemTotal:")) {
        let kilobytes: u64 = total.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        facts.insert("memory", format!("{} MB", kilobytes / 1000));
    }
    facts
}
