//! Commands about TCP, relays, workers and portals.

use crate::args::{Answer, Args};
use crate::peer::{address, line, Peer};
use crate::workers::{Kind, Scripted};
use ockam::remote::RemoteRelayOptions;
use ockam::tcp::{TcpConnectionOptions, TcpInletOptions, TcpListenerOptions, TcpOutletOptions};
use ockam::transport::HostnamePort;
use ockam::{RelayService, RelayServiceOptions};
use serde_json::json;
use std::str::FromStr;

impl Peer {
    pub async fn listen(&self, args: &Args) -> Answer {
        let name = args.text("name")?;
        let bind = args.maybe_text("address").unwrap_or("127.0.0.1:0");
        let options = TcpListenerOptions::new();
        let flow = options.spawner_flow_control_id();
        let listener = self.tcp.listen(bind, options).await.map_err(line)?;
        let answer = json!({"address": listener.socket_string()});
        let mut names = self.names.lock().unwrap();
        names.flows.insert(name.to_string(), flow);
        names.tcp_listeners.insert(name.to_string(), listener);
        Ok(answer)
    }

    pub async fn connect(&self, args: &Args) -> Answer {
        let name = args.text("name")?;
        let options = TcpConnectionOptions::new().with_timeout(args.timeout());
        let flow = options.flow_control_id();
        let connection = self
            .tcp
            .connect(args.text("address")?.to_string(), options)
            .await
            .map_err(line)?;
        let answer = json!({"worker": connection.sender_address().address()});
        let mut names = self.names.lock().unwrap();
        names.flows.insert(name.to_string(), flow);
        names.connections.insert(name.to_string(), connection);
        Ok(answer)
    }

    pub fn disconnect(&self, args: &Args) -> Answer {
        let name = args.text("name")?;
        let (connection, listener) = {
            let mut names = self.names.lock().unwrap();
            (
                names.connections.remove(name),
                names.tcp_listeners.remove(name),
            )
        };
        match (connection, listener) {
            (Some(connection), _) => connection.stop(self.node.context()).map_err(line)?,
            (_, Some(listener)) => self
                .tcp
                .stop_listener(listener.processor_address())
                .map_err(line)?,
            _ => return Err(format!("no connection or TCP listener is called {name:?}")),
        }
        Ok(json!({}))
    }

    pub async fn relay_service(&self, args: &Args) -> Answer {
        let mut options = RelayServiceOptions::new()
            .alias("static_forwarding_service")
            .prefix(args.maybe_text("prefix").unwrap_or("forward_to_"));
        for id in self.open(args)? {
            options = options.service_as_consumer(&id).relay_as_consumer(&id);
        }
        if let Some(authority) = self.authority(args).await? {
            options = options.authority(authority, self.node.identities_attributes());
        }
        RelayService::create(self.node.context(), "forwarding_service", options).map_err(line)?;
        Ok(json!({}))
    }

    pub async fn relay(&self, args: &Args) -> Answer {
        let via = self.route(args, "via")?;
        let options = RemoteRelayOptions::new();
        let relay = async {
            match args.maybe_text("alias") {
                Some(alias) => self.node.create_static_relay(via, alias, options).await,
                None => self.node.create_relay(via, options).await,
            }
        };
        let relay = tokio::time::timeout(args.timeout(), relay)
            .await
            .map_err(|_| "no answer from the relay service in time".to_string())?
            .map_err(line)?;
        Ok(json!({
            "address": relay.remote_address(),
            "worker": relay.worker_address().address(),
        }))
    }

    pub fn worker(&self, args: &Args) -> Answer {
        let kind = Kind::parse(args.text("kind")?)?;
        let at = address(args.text("address")?);
        for id in self.open(args)? {
            self.node.flow_controls().add_consumer(&at, &id);
        }
        // The node has its sink at `app` from the start: opening it is all there is to do.
        if at.address() != "app" || kind != Kind::Sink {
            self.node
                .start_worker(at, Scripted::new(kind))
                .map_err(line)?;
        }
        Ok(json!({}))
    }

    pub fn stop(&self, args: &Args) -> Answer {
        let at = address(args.text("address")?);
        self.node.context().stop_address(&at).map_err(line)?;
        Ok(json!({}))
    }

    pub fn outlet(&self, args: &Args) -> Answer {
        let mut options = TcpOutletOptions::new();
        for id in self.open(args)? {
            options = options.as_consumer(&id);
        }
        let to = HostnamePort::from_str(args.text("to")?).map_err(line)?;
        self.tcp
            .create_outlet(address(args.text("address")?), to, options)
            .map_err(line)?;
        Ok(json!({}))
    }

    pub async fn inlet(&self, args: &Args) -> Answer {
        let bind = args.maybe_text("bind").unwrap_or("127.0.0.1:0");
        let route = self.route(args, "route")?;
        let inlet = self
            .tcp
            .create_inlet(bind.to_string(), route, TcpInletOptions::new())
            .await
            .map_err(line)?;
        Ok(json!({"address": inlet.socket_address().to_string()}))
    }
}
