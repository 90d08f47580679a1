//! A stock node and the things a script made on it, by name.

use crate::args::{Answer, Args};
use crate::credentials::{Slot, SlotCreator};
use ockam::flow_control::FlowControlId;
use ockam::identity::{
    Identifier, SecureChannel, SecureChannelListenerOptions, SecureChannelOptions,
    TrustEveryonePolicy, TrustMultiIdentifiersPolicy,
};
use ockam::tcp::{TcpConnection, TcpListener, TcpTransport};
use ockam::{Address, Context, Node, Route};
use ockam_core::{AllowAll, DenyAll, TransportType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// One node. Commands run side by side, so everything here is shared.
pub struct Peer {
    pub node: Node,
    pub tcp: Arc<TcpTransport>,
    pub names: Mutex<Names>,
}

/// What the script named.
#[derive(Default)]
pub struct Names {
    pub identities: HashMap<String, Identifier>,
    pub connections: HashMap<String, TcpConnection>,
    pub tcp_listeners: HashMap<String, TcpListener>,
    pub channels: HashMap<String, SecureChannel>,
    pub slots: HashMap<String, Arc<Slot>>,
    /// Connections, TCP listeners, channels and channel listeners: what `open` can name.
    pub flows: HashMap<String, FlowControlId>,
}

/// Turns any error into one line.
pub fn line(error: impl std::fmt::Display) -> String {
    error.to_string().replace('\n', " ")
}

impl Peer {
    pub fn identity(&self, name: &str) -> Result<Identifier, String> {
        self.names
            .lock()
            .unwrap()
            .identities
            .get(name)
            .cloned()
            .ok_or_else(|| format!("no identity is called {name:?}"))
    }

    pub fn channel(&self, name: &str) -> Result<SecureChannel, String> {
        self.names
            .lock()
            .unwrap()
            .channels
            .get(name)
            .cloned()
            .ok_or_else(|| format!("no channel is called {name:?}"))
    }

    pub fn slot(&self, name: &str) -> Arc<Slot> {
        self.names
            .lock()
            .unwrap()
            .slots
            .entry(name.to_string())
            .or_default()
            .clone()
    }

    /// The flow control ids of the names in `open`: who may reach what the command starts.
    pub fn open(&self, args: &Args) -> Result<Vec<FlowControlId>, String> {
        let names = self.names.lock().unwrap();
        args.list("open")
            .into_iter()
            .map(|name| {
                names
                    .flows
                    .get(name)
                    .cloned()
                    .ok_or_else(|| format!("nothing to open to is called {name:?}"))
            })
            .collect()
    }

    /// A route: `@NAME` stands for a connection or channel of this node, `N#ADDRESS` for a typed address,
    /// anything else for a local one.
    pub fn route(&self, args: &Args, key: &str) -> Result<Route, String> {
        let names = self.names.lock().unwrap();
        let mut hops: Vec<Address> = Vec::new();
        for hop in args.list(key) {
            hops.push(match hop.strip_prefix('@') {
                Some(name) => match (names.connections.get(name), names.channels.get(name)) {
                    (Some(connection), _) => connection.sender_address().clone(),
                    (_, Some(channel)) => channel.encryptor_address().clone(),
                    _ => return Err(format!("no connection or channel is called {name:?}")),
                },
                None => address(hop),
            });
        }
        if hops.is_empty() {
            return Err(format!("the command needs a list of addresses {key:?}"));
        }
        Ok(Route::create(hops))
    }

    /// A context of its own for one command: may send anywhere, receives nothing unless asked to.
    pub fn sender(&self) -> Result<Context, String> {
        self.node
            .context()
            .new_detached(Address::random_local(), DenyAll, AllowAll)
            .map_err(line)
    }

    /// The authority named by `authority`, a change history in hex: stored first, as the crate demands.
    pub async fn authority(&self, args: &Args) -> Result<Option<Identifier>, String> {
        match args.maybe_text("authority") {
            Some(history) => self.import(history).await.map(Some),
            None => Ok(None),
        }
    }

    pub async fn import(&self, history: &str) -> Result<Identifier, String> {
        self.node
            .import_identity_hex(None, history)
            .await
            .map_err(line)
    }

    pub async fn listener_options(
        &self,
        args: &Args,
    ) -> Result<SecureChannelListenerOptions, String> {
        let mut options = SecureChannelListenerOptions::new();
        for id in self.open(args)? {
            options = options.as_consumer(&id);
        }
        options = match trusted(args)? {
            Some(ids) => options.with_trust_policy(TrustMultiIdentifiersPolicy::new(ids)),
            None => options.with_trust_policy(TrustEveryonePolicy),
        };
        if let Some(authority) = self.authority(args).await? {
            options = options.with_authority(authority);
        }
        if let Some(slot) = args.maybe_text("credential") {
            let creator = Arc::new(SlotCreator(self.slot(slot)));
            options = options
                .with_credential_retriever_creator(creator)
                .map_err(line)?;
        }
        Ok(options)
    }

    pub async fn channel_options(&self, args: &Args) -> Result<SecureChannelOptions, String> {
        let mut options = SecureChannelOptions::new().with_timeout(args.timeout());
        options = match trusted(args)? {
            Some(ids) => options.with_trust_policy(TrustMultiIdentifiersPolicy::new(ids)),
            None => options.with_trust_policy(TrustEveryonePolicy),
        };
        if let Some(authority) = self.authority(args).await? {
            options = options.with_authority(authority);
        }
        if let Some(slot) = args.maybe_text("credential") {
            let creator = Arc::new(SlotCreator(self.slot(slot)));
            options = options
                .with_credential_retriever_creator(creator)
                .map_err(line)?;
        }
        Ok(options)
    }

    /// Runs one command by its name.
    pub async fn run(&self, args: &Args) -> Answer {
        match args.text("cmd")? {
            "identity" => self.create_identity(args).await,
            "rotate" => self.rotate(args).await,
            "import" => self.import_identity(args).await,
            "issue" => self.issue(args).await,
            "slot" => self.fill_slot(args).await,
            "verify" => self.verify(args).await,
            "attributes" => self.attributes(args).await,
            "listen" => self.listen(args).await,
            "connect" => self.connect(args).await,
            "disconnect" => self.disconnect(args),
            "relay_service" => self.relay_service(args).await,
            "relay" => self.relay(args).await,
            "worker" => self.worker(args),
            "stop" => self.stop(args),
            "listener" => self.listener(args).await,
            "dial" => self.dial(args).await,
            "reroute" => self.reroute(args),
            "close" => self.close(args),
            "channels" => Ok(self.channels()),
            "wait_channels" => self.wait_channels(args).await,
            "send" => self.send(args).await,
            "flood" => self.flood(args).await,
            "request" => self.request(args).await,
            "requests" => self.requests(args).await,
            "outlet" => self.outlet(args),
            "inlet" => self.inlet(args).await,
            other => Err(format!("unknown command {other:?}")),
        }
    }
}

/// An address as commands write it.
pub fn address(text: &str) -> Address {
    match text.split_once('#') {
        Some((kind, rest)) if kind.parse::<u8>().is_ok() => {
            Address::new_with_string(TransportType::new(kind.parse().unwrap()), rest)
        }
        _ => Address::new_with_string(ockam_core::LOCAL, text),
    }
}

/// The identifiers of `trust`; none for `everyone`, which a script has to say.
fn trusted(args: &Args) -> Result<Option<Vec<Identifier>>, String> {
    if args.maybe_text("trust") == Some("everyone") {
        return Ok(None);
    }
    let ids = args
        .list("trust")
        .into_iter()
        .map(|id| Identifier::try_from(id).map_err(line))
        .collect::<Result<Vec<_>, _>>()?;
    if ids.is_empty() {
        return Err("the command needs \"trust\": \"everyone\" or a list of identifiers".into());
    }
    Ok(Some(ids))
}
