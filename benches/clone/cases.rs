//! The cases, and how each is measured against each server.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::answer::Checksum;
use crate::git_command::{git_in, run};
use crate::git_peer::GitPeer;
use crate::measure::{self, Figures, MOST_ROUNDS};
use crate::options::{CaseKind, Options, Side};
use crate::process::{self, MemorySampler};
use crate::repository::Repository;
use crate::warmdock_peer::{Warmdock, Warming};
use crate::wire::{self, Part, Remote, Work};

/// Name of the measured repository in its folder.
const NAME: &str = "repo";
/// A cold round starts a service on a fresh copy of its data, which takes longer than most rounds.
const MOST_COLD_ROUNDS: usize = 3;

pub struct Case {
    pub kind: CaseKind,
    pub clients: usize,
    pub work: Work,
}

impl Case {
    pub fn title(&self) -> &'static str {
        match self.kind {
            CaseKind::Full => "full clone",
            CaseKind::FullUnchecked => "full clone, checksum not computed",
            CaseKind::Depth1 => "clone, depth 1",
            CaseKind::Fetch => "incremental fetch",
            CaseKind::Refs => "ref list",
        }
    }

    /// With the number of clients, for a sentence.
    pub fn full_title(&self) -> String {
        let clients = self.clients;
        let plural = if clients == 1 { "" } else { "s" };
        format!("{}, {clients} client{plural}", self.title())
    }
}

/// None where it was not to be measured; an error where it could not be.
pub type Measured = Option<Result<Figures>>;

pub struct Outcome {
    pub case: Case,
    pub git: Measured,
    pub cold: Measured,
    pub warm: Measured,
    pub file: Measured,
}

/// Which cases there are, in the order of the table.
pub fn all(options: &Options, repository: &Repository) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for &kind in &options.cases {
        let (work, clients) = match kind {
            CaseKind::Full => (Work::FullClone(Checksum::Verified), &options.clients[..]),
            CaseKind::FullUnchecked => (Work::FullClone(Checksum::Unchecked), &options.clients[..]),
            CaseKind::Depth1 => (Work::Depth1, &options.clients[..]),
            CaseKind::Fetch => {
                let (haves, wants) = repository.fetch_since(options.behind)?;
                (Work::Fetch { haves, wants }, &[1][..])
            }
            CaseKind::Refs => (Work::RefList, &[1][..]),
        };
        cases.extend(clients.iter().map(|&clients| Case {
            kind,
            clients,
            work: work.clone(),
        }));
    }
    Ok(cases)
}

/// The servers that run through the whole benchmark.
pub struct Servers {
    repositories: PathBuf,
    /// Where warmdock's data folders are made.
    folder: PathBuf,
    pub git: Option<GitPeer>,
    warmdock: Option<Warmdock>,
    /// How long warmdock took from its start until the repository was mirrored.
    pub mirrored_in: Option<Duration>,
}

impl Servers {
    /// `repositories` holds the repository as `repo.git`; `short_folder` is for sockets, whose paths are limited.
    pub fn start(
        options: &Options,
        repositories: PathBuf,
        folder: PathBuf,
        short_folder: PathBuf,
    ) -> Result<Self> {
        let mut servers = Self {
            repositories,
            folder,
            git: None,
            warmdock: None,
            mirrored_in: None,
        };
        if options.measures(Side::Git) {
            let workers = options.fcgi_workers;
            servers.git = Some(GitPeer::start(
                &servers.repositories,
                &short_folder,
                workers,
            )?);
        }
        if options.measures(Side::Warmdock) {
            servers.mirrored_in = Some(servers.make_pristine_data()?);
            let warm = servers.folder.join("warm");
            servers.warmdock = Some(servers.warmdock_at(warm, Warming::Warm)?);
        }
        Ok(servers)
    }

    fn warmdock_at(&self, data_dir: PathBuf, warming: Warming) -> Result<Warmdock> {
        Warmdock::start(&self.repositories, NAME, &data_dir, warming)
    }

    /// Lets warmdock mirror the repository and nothing more: the state before a cold answer.
    fn make_pristine_data(&self) -> Result<Duration> {
        let pristine = self.folder.join("pristine");
        let started = Instant::now();
        let service = self.warmdock_at(pristine.clone(), Warming::OnDemand)?;
        wire::perform(&Work::RefList, &service.remote(NAME), None)
            .context("the first reference list of warmdock")?;
        // The mirror is a plain bare repository; it may still be on its way when references are served already.
        let mirror = pristine.join("git/bench.test").join(format!("{NAME}.git"));
        let wanted = self.references(&self.repositories.join(format!("{NAME}.git")))?;
        while self.references(&mirror).ok().as_ref() != Some(&wanted) {
            ensure!(
                started.elapsed() < Duration::from_secs(900),
                "after 15 minutes the mirror {} has not the references of its upstream",
                mirror.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(started.elapsed())
    }

    fn references(&self, repository: &std::path::Path) -> Result<String> {
        git_in(
            repository,
            &[
                "for-each-ref",
                "--format=%(objectname) %(refname)",
                "refs/heads",
                "refs/tags",
            ],
        )
    }

    /// Measures a case against everything that runs, one after the other.
    pub fn measure(&self, case: Case) -> Outcome {
        let progress = |side: &str| eprintln!("{}: {side}", case.full_title());
        let git = self.git.as_ref().map(|git| {
            progress("git");
            measure_git(git, &case)
        });
        let warm = self.warmdock.as_ref().map(|service| {
            progress("warmdock warm");
            measure_warm(service, &case)
        });
        let cold = self.warmdock.as_ref().map(|_| {
            progress("warmdock cold");
            self.measure_cold(&case)
        });
        let file = self.git.as_ref().map(|git| {
            progress("static file");
            // What warmdock sends is the comparison that counts; git's own answer only when it is measured alone.
            let original = self.warmdock.as_ref().map(|service| service.remote(NAME));
            let original = original.unwrap_or_else(|| git.remote(&format!("{NAME}.git")));
            measure_file(git, &original, &case)
        });
        for (side, measured) in [
            ("git", &git),
            ("warm", &warm),
            ("cold", &cold),
            ("static", &file),
        ] {
            match measured {
                Some(Ok(figures)) => eprintln!(
                    "    {side}: {:.4} s, {} rounds, server CPU {:.2?}",
                    figures.wall.as_secs_f64(),
                    figures.rounds,
                    figures.server_cpu.unwrap_or_default()
                ),
                Some(Err(error)) => eprintln!("    {side}: failed: {error:#}"),
                None => {}
            }
        }
        Outcome {
            case,
            git,
            cold,
            warm,
            file,
        }
    }

    /// Each round asks a service that was just started on data without any finished answer.
    fn measure_cold(&self, case: &Case) -> Result<Figures> {
        let mut cpu = Duration::ZERO;
        let mut peak = 0;
        let mut mapped = 0;
        let mut figures = measure::rounds_with(MOST_COLD_ROUNDS, |_| {
            let data_dir = self.folder.join("cold");
            if data_dir.exists() {
                fs::remove_dir_all(&data_dir)?;
            }
            run(Command::new("cp")
                .args(["-a", "--reflink=auto"])
                .args([self.folder.join("pristine"), data_dir.clone()]))?;
            let service = self.warmdock_at(data_dir, Warming::OnDemand)?;
            let remote = service.remote(NAME);
            // Opens the mirror: what is measured is the making of the answer, not the start.
            wire::perform(&Work::Head, &remote, None)?;
            process::reset_peak_memory(service.pid())?;
            let before = process::cpu_time(service.pid());
            let round = measure::round(&case.work, &remote, case.clients)?;
            cpu += process::cpu_time(service.pid()) - before;
            peak = peak.max(process::peak_memory(service.pid()).unwrap_or(0));
            mapped = mapped.max(process::mapped_files(service.pid()).unwrap_or(0));
            Ok(round)
        })?;
        figures.server_cpu = Some(cpu / figures.rounds as u32);
        figures.peak_memory = Some(peak);
        figures.mapped_files = Some(mapped);
        Ok(figures)
    }
}

fn measure_git(git: &GitPeer, case: &Case) -> Result<Figures> {
    let name = format!("{NAME}.git");
    // Once unmeasured, so that pages of the pack are in memory.
    measure::round(&case.work, &git.remote(&name), 1)?;
    let mut figures = measure::rounds(&case.work, &git.remote(&name), case.clients)?;
    // Accounting in rounds of its own, so that it does not slow the timed ones.
    let before = git.cpu_time();
    let sampler = MemorySampler::start(git.roots());
    let rounds = figures.rounds.min(5);
    for _ in 0..rounds {
        measure::round(&case.work, &git.accounted_remote(&name), case.clients)?;
    }
    figures.peak_memory = Some(sampler.finish());
    figures.server_cpu = Some((git.cpu_time() - before) / rounds as u32);
    Ok(figures)
}

fn measure_warm(service: &Warmdock, case: &Case) -> Result<Figures> {
    let remote = service.remote(NAME);
    // Twice unmeasured: an answer may be kept only when it is asked for the second time.
    for _ in 0..2 {
        measure::round(&case.work, &remote, 1)?;
    }
    process::reset_peak_memory(service.pid())?;
    let before = process::cpu_time(service.pid());
    let mut figures = measure::rounds(&case.work, &remote, case.clients)?;
    let cpu = process::cpu_time(service.pid()) - before;
    figures.server_cpu = Some(cpu / figures.rounds as u32);
    figures.peak_memory = process::peak_memory(service.pid());
    figures.mapped_files = process::mapped_files(service.pid());
    Ok(figures)
}

fn measure_file(git: &GitPeer, original: &Remote, case: &Case) -> Result<Figures> {
    let name = format!("{:?}", case.kind).to_lowercase();
    let folder = git.recording_folder(&name)?;
    let mut record = |part: Part| -> Result<Box<dyn Write>> {
        let file = fs::File::create(folder.join(part.name()))?;
        Ok(Box::new(BufWriter::new(file)))
    };
    wire::perform(&case.work, original, Some(&mut record)).context("recording")?;
    let remote = git.recorded_remote(&name);
    measure::round(&case.work, &remote, 1)?;
    let before = git.nginx_cpu_time();
    let mut figures = measure::rounds_with(MOST_ROUNDS, |_| {
        measure::round(&case.work, &remote, case.clients)
    })?;
    figures.server_cpu = Some((git.nginx_cpu_time() - before) / figures.rounds as u32);
    Ok(figures)
}
