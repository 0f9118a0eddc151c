// The WebSocket: frames of a record and the bytes that go with it, as demo/messages.py has them.

export class Connection {
  /** `onMessage(record, parts)`: part 0 is the record itself. `onState(up)`. */
  constructor(url, onMessage, onState) {
    this.url = url;
    this.onMessage = onMessage;
    this.onState = onState;
    this.wait = 250;
    this.open();
  }

  open() {
    this.socket = new WebSocket(this.url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => { this.wait = 250; this.onState(true); };
    this.socket.onmessage = (event) => {
      const parts = unpack(event.data);
      this.onMessage(JSON.parse(new TextDecoder().decode(parts[0])), parts);
    };
    this.socket.onclose = () => {
      this.onState(false);
      setTimeout(() => this.open(), this.wait);
      this.wait = Math.min(this.wait * 2, 5000);
    };
  }

  get up() { return this.socket.readyState === WebSocket.OPEN; }

  /** Sends a record with further parts (Uint8Array). Returns whether the connection is up. */
  send(record, parts = []) {
    if (!this.up) return false;
    this.socket.send(pack([new TextEncoder().encode(JSON.stringify(record)), ...parts]));
    return true;
  }
}

function pack(parts) {
  const frame = new Uint8Array(parts.reduce((sum, part) => sum + 4 + part.length, 0));
  const view = new DataView(frame.buffer);
  let at = 0;
  for (const part of parts) {
    view.setUint32(at, part.length, true);
    frame.set(part, at + 4);
    at += 4 + part.length;
  }
  return frame;
}

function unpack(buffer) {
  const view = new DataView(buffer), parts = [];
  for (let at = 0; at < buffer.byteLength;) {
    const length = view.getUint32(at, true);
    parts.push(new Uint8Array(buffer, at + 4, length));
    at += 4 + length;
  }
  return parts;
}
