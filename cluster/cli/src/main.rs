//! `blixard`: the command line of the cloud.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod args;
mod change;
mod cluster;
mod console;
mod dev;
mod doctor;
mod error;
mod exec;
mod follow;
mod health;
mod image;
mod kernel;
mod list;
mod node;
mod output;
mod programs;
mod progress;
mod pump;
mod run;
mod terminal;
mod units;
mod upload;

use std::process::ExitCode;

use blixard_api::Client;
use blixard_api::client::{ClientError, Host};
use blixard_api::token::{ApiToken, NotAToken};
use clap::{CommandFactory, Parser};

use args::{Cli, Command, Format};
use error::{CliError, code};
use output::Output;

/// What every command needs.
pub struct Context {
    /// The node to ask.
    pub client: Client,
    /// The project of names.
    pub project: String,
    /// Where and in which form to answer.
    pub output: Output,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let output = Output { format: cli.global.output, quiet: cli.global.quiet };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => {
            output.error(&CliError::local("cannot start", source));
            return code::ERROR.into();
        }
    };
    let result = runtime.block_on(dispatch(cli, output));
    // A thread may wait for standard input for ever.
    runtime.shutdown_background();
    match result {
        Ok(code) => code.into(),
        Err(error) => {
            output.error(&error);
            error.code().into()
        }
    }
}

async fn dispatch(cli: Cli, output: Output) -> Result<u8, CliError> {
    let mut host: Host = cli.global.host.parse().map_err(ClientError::from)?;
    if let Some(text) = cli.global.token.filter(|_| matches!(host, Host::Https(..))) {
        let token: ApiToken = text.parse().map_err(|error: NotAToken| CliError::Usage {
            message: error.to_string(),
            suggestion: "blixard token create NAME, on a node".into(),
        })?;
        host = host.with_access(token.0);
    }
    let context = Context { client: Client::new(host), project: cli.global.project, output };
    match cli.command {
        Command::Run(options) => run::run(&context, *options).await,
        Command::Ps(options) => list::ps(&context, &options).await,
        Command::Inspect(options) => list::inspect(&context, &options.vms).await,
        Command::Logs(options) => console::logs(&context, &options).await,
        Command::Console(options) => console::console(&context, &options.vm).await,
        Command::Exec(options) => exec::exec(&context, options).await,
        Command::Stop(options) => change::stop(&context, &options).await,
        Command::Start(options) => change::start(&context, &options).await,
        Command::Rm(options) => change::remove(&context, &options).await,
        Command::Wait(options) => change::wait(&context, &options).await,
        Command::Image(command) => image::image(&context, command).await,
        Command::Kernel(command) => kernel::kernel(&context, command).await,
        Command::Cluster(command) => cluster::cluster(&context, command).await,
        Command::Join(options) => cluster::join(&context, options).await,
        Command::Node(command) => cluster::node(&context, command).await,
        Command::Token(command) => cluster::token(&context, command).await,
        Command::Doctor(options) => doctor::doctor(&context, &options).await,
        Command::Dev(options) => dev::dev(output, options).await,
        Command::Version => version(&context).await,
        Command::Completion { shell } => {
            let mut script = vec![];
            clap_complete::generate(shell, &mut Cli::command(), "blixard", &mut script);
            output.text(&String::from_utf8_lossy(&script))?;
            Ok(0)
        }
    }
}

/// A wrong command line, help or version: as clap shows it, or as JSON when the command line asks for that.
fn usage(error: &clap::Error) -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let json = words.windows(2).any(|w| matches!(w, [o, f] if (o == "-o" || o == "--output") && f == "json"))
        || words.iter().any(|w| w == "-ojson" || w == "--output=json");
    if error.use_stderr() && json {
        let text = error.render().to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let output = Output { format: Format::Json, quiet: false };
        output.error(&CliError::Usage { message, suggestion: "blixard --help".into() });
    } else {
        // Nobody can be told when this fails.
        let _ = error.print();
    }
    if error.use_stderr() { code::USAGE.into() } else { ExitCode::SUCCESS }
}

/// The versions of this program and, when it answers, of the node.
async fn version(context: &Context) -> Result<u8, CliError> {
    let client = env!("CARGO_PKG_VERSION");
    let (node, problem) = match context.client.version().await {
        Ok(version) => (Some(version), None),
        Err(error) => (None, Some(error)),
    };
    if context.output.structured() {
        context.output.value(&serde_json::json!({ "client": client, "node": node }))?;
        return Ok(0);
    }
    context.output.line(&format!("blixard {client}"))?;
    match (node, problem) {
        (Some(v), _) => {
            context
                .output
                .line(&format!("node {} {} (feature level {})", v.node, v.version, v.feature_level))?;
        }
        (None, Some(error)) => context.output.note(&output::printable(&format!("node: {error}"))),
        (None, None) => {}
    }
    Ok(0)
}
