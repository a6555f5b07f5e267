//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Parser, Subcommand};

use crate::client_config::ServiceUrl;
use crate::config::environment::Environment;
use crate::config::problem::quote;
use crate::config::source::Source;
use crate::config::upstream_url::{self, UpstreamUrl};
use crate::git::name;

/// Keeps container builds warm: a pool of pre-warmed Git mirrors, and a cache of crates.
#[derive(Debug, Parser)]
#[command(name = "warmdock", version, after_help = EXIT_STATUS)]
pub struct Cli {
    /// Configuration file. Default: $WARMDOCK_CONFIG, else /config/app_config.json if it exists, else the embedded default
    #[arg(long, global = true, value_name = "PATH")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Option<Command>,
}

const EXIT_STATUS: &str =
    "Exit status: 0 fine, 64 wrong command line, 78 wrong configuration, 1 anything else";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the service in the foreground (the default)
    Serve(Serve),
    /// Validate the configuration and print the effective one, without secrets
    Check {
        /// Print the JSON Schema of the configuration file instead
        #[arg(long)]
        schema: bool,
    },
    /// Ask the running service whether it is ready; exit status 0 or 1
    Healthcheck,
    /// Print the configuration that sends a client through this service
    ClientConfig {
        #[command(subcommand)]
        client: Client,
    },
}

#[derive(Debug, Default, Args)]
pub struct Serve {
    /// Add an upstream, such as github.com=https://github.com or local=file:///srv/git; repeatable
    #[arg(long = "upstream", value_name = "NAME=URL", value_parser = upstream)]
    pub upstreams: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
pub enum Client {
    /// A .gitconfig for git, and for cargo, which reads the same file
    Git {
        /// Where clients reach this service, such as http://warmdock:8080 or ssh://git@warmdock:2222
        #[arg(long, required_unless_present = "ssh")]
        url: Option<ServiceUrl>,
        /// Through the SSH door; without --url, at the host `warmdock` and the port of `listen.ssh`
        #[arg(long)]
        ssh: bool,
    },
    /// A config.toml for cargo
    Cargo {
        /// Where clients reach this service, such as http://warmdock:8080
        #[arg(long, value_parser = http_url)]
        url: ServiceUrl,
    },
}

impl Cli {
    /// Reads the command line of the process.
    ///
    /// # Errors
    /// What is wrong, or what `--help` and `--version` print.
    pub fn of_process() -> Result<Self, clap::Error> {
        Self::read(std::env::args_os())
    }

    fn read<T: Into<OsString> + Clone>(
        line: impl IntoIterator<Item = T>,
    ) -> Result<Self, clap::Error> {
        // SECURITY: clap repeats what it does not understand, and that may be a URL with a password.
        Self::try_parse_from(line).map_err(|mut error| {
            for kind in [
                ContextKind::InvalidValue,
                ContextKind::InvalidArg,
                ContextKind::InvalidSubcommand,
            ] {
                if matches!(error.get(kind), Some(ContextValue::String(text)) if text.contains('@'))
                {
                    error.insert(kind, ContextValue::String("***".into()));
                }
            }
            error
        })
    }

    /// Where the configuration comes from, and what to do; without a command, to serve.
    pub fn split(self, environment: Environment) -> (Source, Command) {
        let source = Source::find(self.config, environment);
        (
            source,
            self.command.unwrap_or(Command::Serve(Serve::default())),
        )
    }
}

fn http_url(text: &str) -> Result<ServiceUrl, String> {
    let url: ServiceUrl = text.parse()?;
    if !url.is_http() {
        return Err(
            "expected a URL such as http://warmdock:8080, as crates do not come over SSH".into(),
        );
    }
    Ok(url)
}

fn upstream(text: &str) -> Result<(String, String), String> {
    let (host, url) = text
        .split_once('=')
        .ok_or("expected NAME=URL, found no `=`")?;
    if !name::is_host(host) {
        return Err(format!(
            "expected a host name before the `=`, found {}",
            quote(host)
        ));
    }
    UpstreamUrl::parse(url)
        .map_err(|wrong| format!("expected {}, found {wrong}", upstream_url::ALLOWED))?;
    Ok((host.into(), url.into()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(line.split(' '))
    }

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_a_command_it_serves() {
        let (_, command) = parse("warmdock").unwrap().split(Environment::default());
        assert!(matches!(command, Command::Serve(serve) if serve.upstreams.is_empty()));
    }

    #[test]
    fn the_configuration_is_named_before_or_behind_the_command() {
        for line in ["warmdock --config /a check", "warmdock check --config /a"] {
            assert_eq!(parse(line).unwrap().config, Some("/a".into()), "{line}");
        }
    }

    #[test]
    fn upstreams_repeat() {
        let cli = parse("warmdock serve --upstream a=https://a.example --upstream b:1=file:///b")
            .unwrap();
        let Some(Command::Serve(serve)) = cli.command else {
            panic!("not serve")
        };
        let text = |text: &str| text.to_string();
        assert_eq!(
            serve.upstreams,
            [
                (text("a"), text("https://a.example")),
                (text("b:1"), text("file:///b"))
            ]
        );
    }

    #[test]
    fn wrong_lines_are_refused() {
        for line in [
            "warmdock frobnicate",
            "warmdock --frobnicate",
            "warmdock client-config",
            "warmdock client-config git",
            "warmdock client-config git --url ftp://x",
            "warmdock client-config cargo",
            "warmdock client-config cargo --url ssh://git@x",
            "warmdock serve --upstream github.com",
            "warmdock serve --upstream ../x=https://github.com",
            "warmdock serve --upstream x=git@x:y",
        ] {
            assert!(parse(line).unwrap_err().use_stderr(), "{line}");
        }
    }

    #[test]
    fn a_refused_upstream_says_why() {
        let message = parse("warmdock serve --upstream x=ftp://x")
            .unwrap_err()
            .to_string();
        assert!(message.contains("a URL of the scheme `ftp`"), "{message}");
    }

    #[test]
    fn no_password_is_repeated() {
        for line in [
            "warmdock serve --upstream x=https://me:hunter2@x",
            "warmdock serve --upstream https://me:hunter2@x",
            "warmdock serve --upstream https://me:hunter2@x=",
            "warmdock serve https://me:hunter2@x",
            "warmdock --https://me:hunter2@x",
            "warmdock https://me:hunter2@x",
            "warmdock client-config git --url https://me:hunter2@x",
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
