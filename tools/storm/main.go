// Command storm calls one unary method from many callers at once and counts how the calls end.
//
// Each caller sends the same request again as soon as the last call has ended, whether it was
// answered or refused: the worst that clients without back-off can do. The result is one JSON
// object on stdout.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// raw sends and receives messages as the bytes that they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (raw) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = bytes.Clone(data)
	return nil
}

func (raw) Name() string { return "proto" }

var _ encoding.Codec = raw{}

// seen is what became of the calls of one caller, or of all.
type seen struct {
	answered []float64 // milliseconds of each call that was answered
	refused  []float64 // and of each other call
	ended    map[string]int
	wrong    int
	first    map[string]string // the first text of each status
	pushback int               // refusals that say when to come again
}

func newSeen() *seen { return &seen{ended: map[string]int{}, first: map[string]string{}} }

func (all *seen) add(one *seen) {
	all.answered = append(all.answered, one.answered...)
	all.refused = append(all.refused, one.refused...)
	all.wrong += one.wrong
	all.pushback += one.pushback
	for name, count := range one.ended {
		all.ended[name] += count
	}
	for name, text := range one.first {
		all.first[name] = text
	}
}

type options struct {
	target, method  string
	request, expect []byte
	callers         int
	connections     int
	warm, measured  time.Duration
	obey            bool
	pause           time.Duration
}

func main() {
	var o options
	var request, expect string
	flag.StringVar(&o.target, "target", "127.0.0.1:8001", "the server's address")
	flag.StringVar(&o.method, "method", "/layertap.v1.FeatureService/Extract", "what to call")
	flag.StringVar(&request, "request", "", "a file with the request message")
	flag.StringVar(&expect, "expect", "", "a file whose bytes each answer must contain")
	flag.IntVar(&o.callers, "callers", 8, "callers at once")
	flag.IntVar(&o.connections, "connections", 0, "connections that they share; 0: one each")
	flag.DurationVar(&o.warm, "warm", time.Second, "how long to call before counting")
	flag.DurationVar(&o.measured, "measured", 10*time.Second, "how long to count")
	flag.DurationVar(&o.pause, "pause", 0, "how long a caller waits after a refusal")
	flag.BoolVar(&o.obey, "obey", false, "wait for as long as a refusal's grpc-retry-pushback-ms says")
	flag.Parse()
	var err error
	if o.request, err = os.ReadFile(request); err != nil {
		log.Fatal(err)
	}
	if expect != "" {
		if o.expect, err = os.ReadFile(expect); err != nil {
			log.Fatal(err)
		}
	}
	if o.connections <= 0 {
		o.connections = o.callers
	}
	if err := report(run(o), o); err != nil {
		log.Fatal(err)
	}
}

func run(o options) *seen {
	connections := make([]*grpc.ClientConn, o.connections)
	for i := range connections {
		var err error
		connections[i], err = grpc.NewClient(o.target,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(1<<30)),
			grpc.WithNoProxy(),
			// Each connection is one of its own, and nobody retries but the callers themselves.
			grpc.WithDisableRetry())
		if err != nil {
			log.Fatal(err)
		}
		defer connections[i].Close()
	}
	begin := time.Now().Add(o.warm)
	end := begin.Add(o.measured)
	all, lock, callers := newSeen(), sync.Mutex{}, sync.WaitGroup{}
	for i := range o.callers {
		callers.Go(func() {
			one := newSeen()
			call(connections[i%len(connections)], o, begin, end, one)
			lock.Lock()
			defer lock.Unlock()
			all.add(one)
		})
	}
	callers.Wait()
	return all
}

// call makes calls until the end, and notes those that end within the measured time.
func call(connection *grpc.ClientConn, o options, begin, end time.Time, note *seen) {
	// What is under way at the end is given up: it would be counted at a time without load. Not by
	// a deadline, which the server would see and answer.
	ctx, cancel := context.WithCancel(context.Background())
	defer time.AfterFunc(time.Until(end), cancel).Stop()
	defer cancel()
	for {
		var reply []byte
		var trailer metadata.MD
		started := time.Now()
		err := connection.Invoke(ctx, o.method, &o.request, &reply, grpc.Trailer(&trailer))
		now := time.Now()
		if !now.Before(end) {
			return
		}
		if now.After(begin) {
			note.call(err, reply, o.expect, trailer, now.Sub(started))
		}
		if err != nil {
			time.Sleep(patience(o, trailer))
		}
	}
}

func (note *seen) call(err error, reply, expect []byte, trailer metadata.MD, took time.Duration) {
	ms := float64(took.Microseconds()) / 1000
	code := status.Code(err).String()
	note.ended[code]++
	if err != nil {
		note.refused = append(note.refused, ms)
		if _, known := note.first[code]; !known {
			note.first[code] = status.Convert(err).Message()
		}
		if len(trailer.Get("grpc-retry-pushback-ms")) > 0 {
			note.pushback++
		}
		return
	}
	note.answered = append(note.answered, ms)
	if !bytes.Contains(reply, expect) {
		note.wrong++
	}
}

// patience returns how long a caller waits after a refusal.
func patience(o options, trailer metadata.MD) time.Duration {
	if !o.obey {
		return o.pause
	}
	for _, text := range trailer.Get("grpc-retry-pushback-ms") {
		if ms, err := strconv.Atoi(text); err == nil && ms > 0 {
			return time.Duration(ms) * time.Millisecond
		}
	}
	return o.pause
}

func report(all *seen, o options) error {
	seconds := o.measured.Seconds()
	found := map[string]any{
		"callers":              o.callers,
		"connections":          o.connections,
		"seconds":              seconds,
		"ended":                all.ended,
		"wrong":                all.wrong,
		"first texts":          all.first,
		"with pushback":        all.pushback,
		"answers per second":   float64(len(all.answered)) / seconds,
		"refusals per second":  float64(len(all.refused)) / seconds,
		"ms of answered calls": quantiles(all.answered),
		"ms of refused calls":  quantiles(all.refused),
	}
	text, err := json.Marshal(found)
	if err == nil {
		_, err = fmt.Println(string(text))
	}
	return err
}

func quantiles(values []float64) map[string]float64 {
	found := map[string]float64{}
	if len(values) == 0 {
		return found
	}
	slices.Sort(values)
	for name, part := range map[string]float64{"p50": 0.5, "p99": 0.99, "max": 1} {
		found[name] = values[int(part*float64(len(values)-1))]
	}
	return found
}
