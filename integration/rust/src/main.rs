//! A stock Ockam node that a script drives: one JSON command a line on standard input, one JSON answer or
//! event a line on standard output, logs on standard error. README.md lists the commands.

mod args;
mod channels;
mod content;
mod credentials;
mod identities;
mod network;
mod output;
mod peer;
mod workers;

use args::{Answer, Args};
use ockam::tcp::{TcpTransport, TcpTransportExtension};
use ockam::{Context, NodeBuilder, TryClone};
use output::emit;
use peer::{line, Peer};
use serde_json::{json, Value};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, BufReader};
use tracing_subscriber::EnvFilter;

fn main() -> Result<(), String> {
    // The crate would log to standard output, which belongs to the script.
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("OCKAM_LOG_LEVEL").unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let (context, mut executor) = NodeBuilder::new().no_logging().build();
    executor.execute(script(context)).map_err(line)?
}

async fn script(context: Context) -> Result<(), String> {
    let node = ockam::node(context.try_clone().map_err(line)?)
        .await
        .map_err(line)?;
    tokio::spawn(workers::app(context));
    let tcp: Arc<TcpTransport> = node.create_tcp_transport().map_err(line)?;
    let peer = Arc::new(Peer {
        node,
        tcp,
        names: Default::default(),
    });
    emit(&json!({"event": "ready", "ockam": "0.150.0"}));

    // Commands given as arguments run first, one after the other.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    for argument in arguments {
        if run(&peer, &argument).await {
            return Ok(());
        }
    }
    // Those on standard input run side by side: a script that wants an order waits for each answer.
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    while let Some(text) = input.next_line().await.map_err(line)? {
        if parsed(&text)["cmd"] == "quit" {
            run(&peer, &text).await;
            return Ok(());
        }
        let peer = peer.clone();
        tokio::spawn(async move { run(&peer, &text).await });
    }
    // The script is gone: end as a crash would, without a word to anybody.
    std::process::exit(0);
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// Runs one command and writes its answer. True once the node has been shut down.
async fn run(peer: &Peer, text: &str) -> bool {
    let args = Args(parsed(text));
    let quit = args.0["cmd"] == "quit";
    let answer: Answer = if quit {
        // Sends Close on every live channel.
        let done = peer.node.context().shutdown_node().await;
        done.map(|()| json!({})).map_err(line)
    } else {
        peer.run(&args).await
    };
    emit(&match answer {
        Ok(value) => json!({"id": args.0["id"], "ok": value}),
        Err(error) => json!({"id": args.0["id"], "error": error}),
    });
    quit
}
