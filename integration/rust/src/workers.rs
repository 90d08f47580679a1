//! The workers that a script can start.

use crate::content::sha256;
use crate::output::emit;
use ockam::{deserialize, serialize, Any, Context, MessageReceiveOptions, Result, Routed, Worker};
use ockam_core::async_trait;
use ockam_core::{LocalMessage, NeutralMessage, Route, SecureChannelLocalInfo};
use serde_json::{json, Value};

/// What a [`Scripted`] worker does with a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Emits a `message` event and answers nothing.
    Sink,
    /// Sends the payload back, byte for byte, whatever it is.
    Echo,
    /// Sends a BARE string back; anything else is an error, as with the crate's own example.
    Echoer,
    /// As [`Kind::Echoer`], in upper case.
    Uppercase,
    /// Answers with the BARE string `LENGTH SHA256`.
    Digest,
}

impl Kind {
    pub fn parse(text: &str) -> std::result::Result<Kind, String> {
        match text {
            "sink" => Ok(Kind::Sink),
            "echo" => Ok(Kind::Echo),
            "echoer" => Ok(Kind::Echoer),
            "uppercase" => Ok(Kind::Uppercase),
            "digest" => Ok(Kind::Digest),
            _ => Err(format!("unknown kind of worker {text:?}")),
        }
    }
}

/// A worker that takes raw payloads and counts them.
pub struct Scripted {
    kind: Kind,
    seen: u64,
}

impl Scripted {
    pub fn new(kind: Kind) -> Self {
        Self { kind, seen: 0 }
    }
}

#[async_trait]
impl Worker for Scripted {
    type Message = Any;
    type Context = Context;

    async fn handle_message(&mut self, ctx: &mut Context, msg: Routed<Any>) -> Result<()> {
        let at = msg.msg_addr().address().to_string();
        let message = msg.into_local_message();
        let answer = match self.kind {
            Kind::Sink => {
                report(&at, self.seen, &message);
                self.seen += 1;
                return Ok(());
            }
            Kind::Echo => message.payload.clone(),
            Kind::Echoer => serialize(deserialize::<String>(&message.payload)?)?,
            Kind::Uppercase => serialize(deserialize::<String>(&message.payload)?.to_uppercase())?,
            Kind::Digest => serialize(format!(
                "{} {}",
                message.payload.len(),
                sha256(&message.payload)
            ))?,
        };
        ctx.send(message.return_route, NeutralMessage::from(answer))
            .await
    }
}

/// The sink at `app`, the address that every stock node has from the start.
pub async fn app(mut context: Context) {
    let mut seen = 0;
    while let Ok(msg) = context
        .receive_extended::<NeutralMessage>(MessageReceiveOptions::new().without_timeout())
        .await
    {
        report("app", seen, msg.local_message());
        seen += 1;
    }
}

/// Emits the `message` event of a sink.
fn report(at: &str, seen: u64, message: &LocalMessage) {
    let mut event = describe(message);
    event["event"] = json!("message");
    event["at"] = json!(at);
    event["n"] = json!(seen);
    emit(&event);
}

/// The facts of a received message: length, digest, short contents, verified sender, return route.
pub fn describe(message: &LocalMessage) -> Value {
    let payload = &message.payload;
    let mut facts = json!({
        "len": payload.len(),
        "sha256": sha256(payload),
        "return": route_to_json(&message.return_route),
        "from": SecureChannelLocalInfo::find_info(message)
            .ok()
            .map(|info| info.their_identifier().to_string()),
    });
    if payload.len() <= 256 {
        facts["hex"] = json!(hex::encode(payload));
        if let Ok(text) = deserialize::<String>(payload) {
            facts["text"] = json!(text);
        }
    }
    facts
}

/// A route as a list of addresses, the way commands take them.
pub fn route_to_json(route: &Route) -> Value {
    route
        .iter()
        .map(|address| {
            if address.is_local() {
                address.address().to_string()
            } else {
                address.to_string()
            }
        })
        .collect::<Vec<_>>()
        .into()
}
