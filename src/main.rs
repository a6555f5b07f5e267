//! The command line, the allocator, the runtime and the exit status. Wires, decides nothing.
#![forbid(unsafe_code)]

use std::future::Future;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use warmdock::cli::{Cli, Client, Command, Serve};
use warmdock::client_config::ServiceUrl;
use warmdock::config::Config;
use warmdock::config::environment::Environment;
use warmdock::config::file;
use warmdock::config::problem::Problems;
use warmdock::config::reader::Reader;
use warmdock::config::reload::Reload;
use warmdock::config::source::Source;
use warmdock::config::warnings::warnings;
use warmdock::{client_config, healthcheck, logging, server};

/// musl's own allocator is many times slower under threads.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `EX_USAGE` and `EX_CONFIG` of sysexits.h.
const WRONG_COMMAND_LINE: u8 = 64;
const WRONG_CONFIGURATION: u8 = 78;

fn main() -> ExitCode {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nobody has installed a provider before");
    let cli = match Cli::of_process() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way as well. Nobody is left to tell when they cannot be printed.
            let _ = error.print();
            return if error.use_stderr() {
                WRONG_COMMAND_LINE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let (source, command) = cli.split(Environment::of_process());
    match command {
        Command::Serve(options) => serve(source, options),
        Command::Check { schema: true } => print(&format!("{:#}\n", file::schema().to_value())),
        Command::Check { schema: false } => check(&source),
        Command::Healthcheck => ask_health(&source),
        Command::ClientConfig {
            client: Client::Cargo { url },
        } => match source.load(&mut Reader::default()) {
            Ok(config) => print(&client_config::cargo(&url, &config, |_| true)),
            Err(problems) => wrong_configuration(&source, &problems),
        },
        Command::ClientConfig {
            client: Client::Git { url, ssh },
        } => match source.load(&mut Reader::default()) {
            Ok(config) => git_config(url, ssh, &config),
            Err(problems) => wrong_configuration(&source, &problems),
        },
    }
}

fn serve(source: Source, options: Serve) -> ExitCode {
    logging::start();
    raise_open_files();
    let source = options
        .upstreams
        .into_iter()
        .fold(source, |source, (host, url)| {
            source.with_upstream(host, url)
        });
    let reload = match Reload::first(source.clone()) {
        Ok(reload) => reload,
        Err(problems) => {
            for problem in problems.iter() {
                error!(config = %source, key = problem.key, "the configuration is wrong: {problem}");
            }
            return WRONG_CONFIGURATION.into();
        }
    };
    info!(version = env!("CARGO_PKG_VERSION"), config = %source, data_dir = %reload.current().data_dir.display(), "starting");
    for warning in warnings(reload.current()) {
        warn!(config = %source, "{warning}");
    }
    match run(reload) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Every connection is an open file, and so is much of what it is answered from. The limit that most systems begin with
/// is for programs that use select(2), and as low as `limits.connections`; whoever wants to limit us sets the hard one.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "the limit of open files cannot be raised");
    }
}

fn run(reload: Reload) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(async {
        let stop = stop_signal().context("listening to signals")?;
        let listeners = server::Listeners::bind(&reload.current().listen).await?;
        let config = reload.follow().context("listening to SIGHUP")?;
        server::run(config, listeners, stop).await
    });
    // The server has drained. Work that still runs on a blocking thread survives being killed, by design.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Comes with the first SIGTERM or SIGINT. The second ends the process at once, for who does not want to wait.
fn stop_signal() -> io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    Ok(async move {
        let signal = next().await;
        info!(signal, "asked to stop; a second signal stops at once");
        tokio::spawn(async move {
            let signal = next().await;
            warn!(signal, "stopped at once, answers under way are cut");
            std::process::exit(1);
        });
    })
}

fn check(source: &Source) -> ExitCode {
    match source.load(&mut Reader::default()) {
        Ok(config) => {
            for warning in warnings(&config) {
                eprintln!("warmdock: warning: {warning}");
            }
            print(&format!("{}\n", config.to_json()))
        }
        Err(problems) => wrong_configuration(source, &problems),
    }
}

fn git_config(url: Option<ServiceUrl>, ssh: bool, config: &Config) -> ExitCode {
    let url = match url {
        Some(url) if !ssh => Ok(url),
        url => client_config::through_ssh(url, config),
    };
    match url {
        Ok(url) => print(&client_config::git(&url, config)),
        Err(why) => {
            eprintln!("warmdock: {why}");
            WRONG_COMMAND_LINE.into()
        }
    }
}

fn ask_health(source: &Source) -> ExitCode {
    let asked = source
        .listen_address()
        .map_err(|problems| problems.to_string().replace('\n', "; "));
    let answer = asked.and_then(|(address, tls)| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime
            .map_err(|error| error.to_string())?
            .block_on(healthcheck::ask(address, tls))
    });
    match answer {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("warmdock: {why}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_configuration(source: &Source, problems: &Problems) -> ExitCode {
    eprintln!("warmdock: the configuration is wrong ({source})");
    for problem in problems.iter() {
        eprintln!("  {problem}");
    }
    WRONG_CONFIGURATION.into()
}

/// Fails quietly when the reader is gone, as in `warmdock check | head`.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
