//! What the kernel says about this process, from `/proc`. Reading it touches no disk.

/// Measures of this process; what cannot be read (outside Linux) is missing.
#[derive(Debug, Default, PartialEq)]
pub struct Process {
    /// Memory that is really there, in bytes.
    pub resident_bytes: Option<u64>,
    /// User and system time of all threads, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Open files and sockets.
    pub open_fds: Option<u64>,
}

/// `USER_HZ`, in which `/proc` counts time: 100 on every architecture that we build for, see proc_pid_stat(5).
const TICKS_PER_SECOND: f64 = 100.0;

impl Process {
    /// As it is now.
    pub fn now() -> Self {
        let read = |path| std::fs::read_to_string(path).ok();
        Self {
            // In kB, whatever the page size is (64 KiB on some aarch64): `statm` counts pages.
            resident_bytes: read("/proc/self/status").and_then(|text| resident(&text)),
            cpu_seconds: read("/proc/self/stat").and_then(|text| cpu(&text)),
            // One of them is the folder that is being read.
            open_fds: std::fs::read_dir("/proc/self/fd")
                .ok()
                .map(|fds| fds.count().saturating_sub(1) as u64),
        }
    }
}

/// Bytes of memory that this process may take: of its container, or of the machine.
pub fn memory_limit() -> Option<u64> {
    let read = |path| std::fs::read_to_string(path).ok();
    // Of version 2 and of version 1 of control groups; without a limit there stands no number, or one beyond all memory.
    let groups = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let limits = groups.map(|path| read(path)?.trim().parse().ok());
    let machine = read("/proc/meminfo").and_then(|text| kilobytes(&text, "MemTotal:"));
    limits.into_iter().chain([machine]).flatten().min()
}

fn resident(status: &str) -> Option<u64> {
    kilobytes(status, "VmRSS:")
}

/// The bytes that the line of this name tells.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn cpu(stat: &str) -> Option<f64> {
    // The second field is the program's name in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut times = rest.split(' ').skip(11);
    let user: f64 = times.next()?.parse().ok()?;
    let system: f64 = times.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        assert_eq!(
            resident("Name:\tx\nVmRSS:\t    1234 kB\nThreads:\t1\n"),
            Some(1234 * 1024)
        );
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 4 0 5 6 7";
        assert_eq!(cpu(stat), Some(2.0));
        assert_eq!(resident(""), None);
        assert_eq!(cpu("12 (x"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_memory_time_and_files() {
        let now = Process::now();
        assert!(now.resident_bytes.is_some_and(|bytes| bytes > 0), "{now:?}");
        assert!(now.cpu_seconds.is_some(), "{now:?}");
        assert!(now.open_fds.is_some_and(|fds| fds > 0), "{now:?}");
        let limit = memory_limit();
        assert!(limit > now.resident_bytes, "{limit:?} {now:?}");
    }
}
